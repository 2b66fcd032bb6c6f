//! Weights from outside, on files made here: what is taken, what is refused and in which words, and
//! that what goes out comes back to the bit.

use std::collections::BTreeMap;
use std::io::Write as _;

use belfry_configs::Init;
use belfry_model::resize_positions;
use belfry_worker::weights::{Report, Targets, WeightsError, encode, import};
use safetensors::tensor::{Dtype, TensorView};
use tempfile::TempDir;
use zip::write::SimpleFileOptions;

const WIDTH: usize = 4;
const LAYERS: usize = 2;

/// Tensors by name.
type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// Numbers that tell where they come from: no two tensors share one.
fn add(tensors: &mut Tensors, name: impl Into<String>, shape: &[usize]) {
    let first = tensors.len() as f32 + 1.0;
    let len: usize = shape.iter().product();
    let values = (0..len).map(|i| first + i as f32 / 1024.0).collect();
    tensors.insert(name.into(), (shape.to_vec(), values));
}

/// Both parameters of a linear layer or norm.
fn pair(tensors: &mut Tensors, name: &str, shape: &[usize]) {
    add(tensors, format!("{name}.weight"), shape);
    add(tensors, format!("{name}.bias"), &shape[..1]);
}

/// A model in the authors' names: RoBERTa, CLIP at a grid of 3x3, two cross-modal names and a head.
fn model() -> Targets {
    let mut t = Tensors::new();
    roberta(&mut t, "text_transformer.");
    clip_openai(&mut t, "vit_model.", 3);
    pair(&mut t, "cross_modal_text_transform", &[WIDTH, WIDTH]);
    add(&mut t, "token_type_embeddings.weight", &[3, WIDTH]);
    pair(&mut t, "vqa_classifier.0", &[2 * WIDTH, WIDTH]);
    targets(&t)
}

fn targets(tensors: &Tensors) -> Targets {
    Targets::new(
        tensors
            .iter()
            .map(|(name, (shape, _))| (name.clone(), shape.clone())),
    )
}

fn roberta(t: &mut Tensors, prefix: &str) {
    let at = |name: &str| format!("{prefix}{name}");
    for (table, rows) in [("word", 11), ("position", 9), ("token_type", 1)] {
        add(
            t,
            at(&format!("embeddings.{table}_embeddings.weight")),
            &[rows, WIDTH],
        );
    }
    pair(t, &at("embeddings.LayerNorm"), &[WIDTH]);
    for layer in 0..LAYERS {
        let at = |name: &str| at(&format!("encoder.layer.{layer}.{name}"));
        for part in [
            "attention.self.query",
            "attention.self.key",
            "attention.self.value",
        ] {
            pair(t, &at(part), &[WIDTH, WIDTH]);
        }
        pair(t, &at("attention.output.dense"), &[WIDTH, WIDTH]);
        pair(t, &at("attention.output.LayerNorm"), &[WIDTH]);
        pair(t, &at("intermediate.dense"), &[2 * WIDTH, WIDTH]);
        pair(t, &at("output.dense"), &[WIDTH, 2 * WIDTH]);
        pair(t, &at("output.LayerNorm"), &[WIDTH]);
    }
    pair(t, &at("pooler.dense"), &[WIDTH, WIDTH]);
}

fn clip_openai(t: &mut Tensors, prefix: &str, side: usize) {
    let at = |name: &str| format!("{prefix}{name}");
    add(t, at("positional_embedding"), &[7, 3]);
    pair(t, &at("ln_final"), &[3]);
    add(t, at("visual.class_embedding"), &[WIDTH]);
    add(
        t,
        at("visual.positional_embedding"),
        &[1 + side * side, WIDTH],
    );
    add(t, at("visual.conv1.weight"), &[WIDTH, 3, 2, 2]);
    pair(t, &at("visual.ln_pre"), &[WIDTH]);
    pair(t, &at("visual.ln_post"), &[WIDTH]);
    for layer in 0..LAYERS {
        let at = |name: &str| at(&format!("visual.transformer.resblocks.{layer}.{name}"));
        add(t, at("attn.in_proj_weight"), &[3 * WIDTH, WIDTH]);
        add(t, at("attn.in_proj_bias"), &[3 * WIDTH]);
        pair(t, &at("attn.out_proj"), &[WIDTH, WIDTH]);
        pair(t, &at("ln_1"), &[WIDTH]);
        pair(t, &at("ln_2"), &[WIDTH]);
        pair(t, &at("mlp.c_fc"), &[4 * WIDTH, WIDTH]);
        pair(t, &at("mlp.c_proj"), &[WIDTH, 4 * WIDTH]);
    }
}

fn clip_hf(side: usize) -> Tensors {
    let mut t = Tensors::new();
    let v = |name: &str| format!("vision_model.{name}");
    add(&mut t, "logit_scale", &[]);
    add(&mut t, v("embeddings.class_embedding"), &[WIDTH]);
    add(
        &mut t,
        v("embeddings.patch_embedding.weight"),
        &[WIDTH, 3, 2, 2],
    );
    add(
        &mut t,
        v("embeddings.position_embedding.weight"),
        &[1 + side * side, WIDTH],
    );
    pair(&mut t, &v("pre_layrnorm"), &[WIDTH]);
    pair(&mut t, &v("post_layernorm"), &[WIDTH]);
    for layer in 0..LAYERS {
        let at = |name: &str| v(&format!("encoder.layers.{layer}.{name}"));
        for part in ["q_proj", "k_proj", "v_proj", "out_proj"] {
            pair(&mut t, &at(&format!("self_attn.{part}")), &[WIDTH, WIDTH]);
        }
        pair(&mut t, &at("layer_norm1"), &[WIDTH]);
        pair(&mut t, &at("layer_norm2"), &[WIDTH]);
        pair(&mut t, &at("mlp.fc1"), &[4 * WIDTH, WIDTH]);
        pair(&mut t, &at("mlp.fc2"), &[WIDTH, 4 * WIDTH]);
    }
    t
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

fn safetensors(tensors: &Tensors) -> Vec<u8> {
    let raw: Vec<(&String, &Vec<usize>, Vec<u8>)> = tensors
        .iter()
        .map(|(name, (shape, values))| (name, shape, bytes(values)))
        .collect();
    let views = raw.iter().map(|(name, shape, raw)| {
        (
            name,
            TensorView::new(Dtype::F32, shape.to_vec(), raw).expect("sizes agree"),
        )
    });
    safetensors::serialize(views, None).expect("is written")
}

/// A folder of files.
struct Files(TempDir);

impl Files {
    fn new() -> Self {
        Files(tempfile::tempdir().expect("a folder"))
    }

    fn write(&self, name: &str, content: &[u8]) -> String {
        let path = self.0.path().join(name);
        std::fs::write(&path, content).expect("is written");
        path.display().to_string()
    }
}

/// Imports into a vector of -1, so that what was not filled shows.
async fn fill(
    targets: &Targets,
    from: &[&String],
    fresh: &[&str],
) -> Result<(Vec<f32>, Report), WeightsError> {
    let init = Init {
        from: from.iter().map(|f| (*f).clone()).collect(),
        fresh: fresh.iter().map(|f| (*f).to_owned()).collect(),
        ..Init::default()
    };
    import(&init, targets, vec![-1.0; targets.elements()]).await
}

async fn refused(targets: &Targets, from: &[&String], parts: &[&str]) -> WeightsError {
    let error = fill(targets, from, &[]).await.expect_err("must be refused");
    let told = error.to_string();
    for part in parts {
        assert!(told.contains(part), "`{part}` is not in: {told}");
    }
    error
}

fn part<'a>(targets: &Targets, flat: &'a [f32], name: &str) -> &'a [f32] {
    let target = targets.get(name).expect("is the model's");
    &flat[target.offset..target.offset + target.len]
}

#[tokio::test]
async fn two_encoders_fill_a_model_and_the_rest_is_named_fresh() {
    let files = Files::new();
    let (mut text, image) = (Tensors::new(), clip_hf(2));
    roberta(&mut text, "roberta.");
    pair(&mut text, "lm_head.dense", &[WIDTH, WIDTH]);
    let roberta = files.write("roberta.safetensors", &safetensors(&text));
    let clip = files.write("clip.safetensors", &safetensors(&image));
    let model = model();
    let (flat, report) = fill(&model, &[&roberta, &clip], &[]).await.expect("fits");

    let key = "encoder.layer.1.attention.self.key.weight";
    let name = format!("text_transformer.{key}");
    assert_eq!(
        part(&model, &flat, &name),
        text[&format!("roberta.{key}")].1
    );
    let packed = part(
        &model,
        &flat,
        "vit_model.visual.transformer.resblocks.1.attn.in_proj_weight",
    );
    let third = |p: &str| {
        image[&format!("vision_model.encoder.layers.1.self_attn.{p}.weight")]
            .1
            .clone()
    };
    assert_eq!(
        packed,
        [third("q_proj"), third("k_proj"), third("v_proj")].concat()
    );
    let table = &image["vision_model.embeddings.position_embedding.weight"].1;
    let positions = part(&model, &flat, "vit_model.visual.positional_embedding");
    assert_eq!(
        positions,
        resize_positions(table, WIDTH, 3).expect("a square")
    );

    assert!(report.fresh.contains(&"vqa_classifier.0.weight".to_owned()));
    assert!(
        report
            .fresh
            .contains(&"vit_model.positional_embedding".to_owned())
    );
    for name in &report.fresh {
        assert!(
            part(&model, &flat, name).iter().all(|x| *x == -1.0),
            "{name}"
        );
    }
    assert_eq!(
        report.applied.len() + report.fresh.len(),
        model.iter().count()
    );
    let told = report.to_string();
    for words in [
        "scaled from 2x2 to 3x3",
        "lm_head.dense.weight",
        "sha256",
        "fresh from the seed",
    ] {
        assert!(told.contains(words), "`{words}` is not in: {told}");
    }
}

#[tokio::test]
async fn openais_names_bring_the_leftovers_too() {
    let files = Files::new();
    let (mut text, mut image) = (Tensors::new(), Tensors::new());
    roberta(&mut text, "");
    clip_openai(&mut image, "", 3);
    add(&mut image, "visual.proj", &[WIDTH, 3]);
    add(&mut image, "transformer.resblocks.0.ln_1.weight", &[3]);
    let text = files.write("a", &safetensors(&text));
    let clip = files.write("b", &safetensors(&image));
    let model = model();
    let (flat, report) = fill(&model, &[&text, &clip], &[]).await.expect("fits");
    assert_eq!(
        part(&model, &flat, "vit_model.positional_embedding"),
        image["positional_embedding"].1
    );
    assert_eq!(
        part(&model, &flat, "vit_model.ln_final.bias"),
        image["ln_final.bias"].1
    );
    let unused: Vec<&str> = report.unused.iter().map(|u| u.key.as_str()).collect();
    assert_eq!(
        unused,
        ["transformer.resblocks.0.ln_1.weight", "visual.proj"]
    );
}

/// The authors' checkpoint for two token types, laid into NLVR2's model with three.
#[tokio::test]
async fn a_checkpoint_gets_a_third_token_type_from_the_second() {
    let files = Files::new();
    let mut t = Tensors::new();
    roberta(&mut t, "text_transformer.");
    clip_openai(&mut t, "vit_model.", 3);
    pair(&mut t, "cross_modal_text_transform", &[WIDTH, WIDTH]);
    add(&mut t, "token_type_embeddings.weight", &[2, WIDTH]);
    let whole = files.write("whole", &safetensors(&t));
    let model = model();
    let (flat, report) = fill(&model, &[&whole], &[]).await.expect("fits");
    let rows = &t["token_type_embeddings.weight"].1;
    let expected = [&rows[..], &rows[WIDTH..]].concat();
    assert_eq!(
        part(&model, &flat, "token_type_embeddings.weight"),
        expected
    );
    assert_eq!(
        report.fresh,
        ["vqa_classifier.0.bias", "vqa_classifier.0.weight"]
    );

    // With a cross-modal part from outside, a gap in it is not silently random.
    t.remove("cross_modal_text_transform.bias");
    let gap = files.write("gap", &safetensors(&t));
    refused(
        &model,
        &[&gap],
        &["no file holds 1", "cross_modal_text_transform.bias"],
    )
    .await;
    let fresh = ["cross_modal_"];
    let (_, report) = fill(&model, &[&gap], &fresh).await.expect("on purpose");
    assert!(
        report
            .fresh
            .contains(&"cross_modal_text_transform.bias".to_owned())
    );
}

#[tokio::test]
async fn what_goes_out_comes_back_to_the_bit() {
    let files = Files::new();
    let model = model();
    let flat: Vec<f32> = (0..model.elements()).map(|i| (i as f32).sin()).collect();
    let out = encode(&flat, &model, 9, |_| true);
    let file = files.write("out", &out);
    let (back, report) = fill(&model, &[&file], &[]).await.expect("fits");
    assert_eq!(bytes(&back), bytes(&flat));
    assert_eq!(report.fresh, [""; 0]);
    assert_eq!(encode(&back, &model, 9, |_| true), out);
}

#[tokio::test]
async fn other_backbones_find_their_names() {
    let files = Files::new();
    let mut target = Tensors::new();
    add(&mut target, "vit_model.cls_token", &[1, 1, WIDTH]);
    add(&mut target, "vit_model.pos_embed", &[1, 5, WIDTH]);
    pair(&mut target, "vit_model.patch_embed.proj", &[WIDTH, 3, 2, 2]);
    for part in ["norm1", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"] {
        pair(&mut target, &format!("vit_model.blocks.0.{part}"), &[WIDTH]);
    }
    add(
        &mut target,
        "vit_model.blocks.0.attn.qkv.weight",
        &[3 * WIDTH, WIDTH],
    );
    add(
        &mut target,
        "vit_model.blocks.0.attn.qkv.bias",
        &[3 * WIDTH],
    );
    pair(&mut target, "vit_model.norm", &[WIDTH]);
    let model = targets(&target);

    let timm = target
        .iter()
        .map(|(name, t)| (name["vit_model.".len()..].to_owned(), t.clone()));
    let timm = files.write("timm", &safetensors(&timm.collect()));
    let (flat, report) = fill(&model, &[&timm], &[]).await.expect("fits");
    assert_eq!(
        part(&model, &flat, "vit_model.pos_embed"),
        target["vit_model.pos_embed"].1
    );
    assert_eq!(report.files[0].layout, "ViT/DeiT (timm)");

    let mut hf = Tensors::new();
    add(&mut hf, "vit.embeddings.cls_token", &[1, 1, WIDTH]);
    add(
        &mut hf,
        "vit.embeddings.position_embeddings",
        &[1, 5, WIDTH],
    );
    pair(
        &mut hf,
        "vit.embeddings.patch_embeddings.projection",
        &[WIDTH, 3, 2, 2],
    );
    let block = |name: &str| format!("vit.encoder.layer.0.{name}");
    for name in ["query", "key", "value"] {
        pair(
            &mut hf,
            &block(&format!("attention.attention.{name}")),
            &[WIDTH, WIDTH],
        );
    }
    for name in [
        "attention.output.dense",
        "layernorm_before",
        "layernorm_after",
    ] {
        pair(&mut hf, &block(name), &[WIDTH]);
    }
    pair(&mut hf, &block("intermediate.dense"), &[WIDTH]);
    pair(&mut hf, &block("output.dense"), &[WIDTH]);
    pair(&mut hf, "vit.layernorm", &[WIDTH]);
    let file = files.write("hf", &safetensors(&hf));
    let (flat, report) = fill(&model, &[&file], &[]).await.expect("fits");
    assert_eq!(report.fresh, [""; 0]);
    let value = &hf[&block("attention.attention.value.bias")].1;
    assert_eq!(
        part(&model, &flat, "vit_model.blocks.0.attn.qkv.bias")[2 * WIDTH..],
        value[..]
    );
    assert_eq!(
        part(&model, &flat, "vit_model.blocks.0.norm2.bias"),
        hf[&block("layernorm_after.bias")].1
    );

    // A distilled DeiT has a row more; CLIP is another architecture.
    add(
        &mut hf,
        "vit.embeddings.position_embeddings",
        &[1, 6, WIDTH],
    );
    let distilled = files.write("distilled", &safetensors(&hf));
    refused(
        &model,
        &[&distilled],
        &["pos_embed", "[1, 6, 4]", "distilled"],
    )
    .await;
    let clip = files.write("clip", &safetensors(&clip_hf(2)));
    refused(
        &model,
        &[&clip],
        &["CLIP (transformers)", "no place", "vit_model.visual."],
    )
    .await;
}

#[tokio::test]
async fn files_that_lie_are_named() {
    let files = Files::new();
    let model = model();
    let mut text = Tensors::new();
    roberta(&mut text, "roberta.");
    let good = safetensors(&text);

    let cut = files.write("cut", &good[..good.len() - 5]);
    refused(&model, &[&cut], &["/cut", "is cut off", "ends at byte"]).await;
    let header = files.write("header", &good[..40]);
    refused(
        &model,
        &[&header],
        &["/header", "is cut off", "header ends"],
    )
    .await;
    let longer = files.write("longer", &[&good[..], b"more"].concat());
    refused(&model, &[&longer], &["/longer", "4 bytes behind"]).await;
    let noise = files.write("noise", &[0x7fu8; 64]);
    refused(&model, &[&noise], &["/noise", "neither safetensors nor"]).await;
    let empty = files.write("empty", b"");
    refused(&model, &[&empty], &["/empty", "no file of weights"]).await;
    let missing = files.0.path().join("missing").display().to_string();
    refused(&model, &[&missing], &["/missing", "nothing is downloaded"]).await;
    let legacy = files.write("old.bin", b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.");
    refused(
        &model,
        &[&legacy],
        &["/old.bin", "before 1.6", "torch.save(torch.load("],
    )
    .await;

    let mut resnet = Tensors::new();
    pair(&mut resnet, "layer1.0.conv1", &[WIDTH, WIDTH]);
    let resnet = files.write("resnet", &safetensors(&resnet));
    refused(&model, &[&resnet], &["/resnet", "layer1.0.conv1.bias"]).await;
}

#[tokio::test]
async fn weights_that_lie_are_named() {
    let files = Files::new();
    let model = model();
    let mut text = Tensors::new();
    roberta(&mut text, "roberta.");
    let key = "roberta.encoder.layer.0.output.dense.weight";

    let good = files.write("good", &safetensors(&text));
    let told = [
        "no file holds",
        "vit_model.visual.class_embedding",
        "init.fresh",
    ];
    refused(&model, &[&good], &told).await;
    let fresh = ["vit_model.", "nothing_has_this"];
    let error = fill(&model, &[&good], &fresh)
        .await
        .expect_err("a misspelt prefix");
    assert!(error.to_string().contains("nothing_has_this"), "{error}");
    fill(&model, &[&good], &fresh[..1])
        .await
        .expect("an image tower from nothing, on purpose");

    for value in [f32::NAN, f32::NEG_INFINITY] {
        let mut ill = text.clone();
        ill.get_mut(key).expect("is there").1[6] = value;
        let ill = files.write("ill", &safetensors(&ill));
        refused(
            &model,
            &[&ill],
            &["/ill", key, "element 6", &value.to_string()],
        )
        .await;
    }

    let mut other = text.clone();
    add(&mut other, key, &[WIDTH, WIDTH]);
    let clip = files.write("clip", &safetensors(&clip_hf(3)));
    let misshaped = files.write("misshaped", &safetensors(&other));
    let told = ["1 tensors", key, "[4, 4]", "needs [4, 8]"];
    refused(&model, &[&misshaped, &clip], &told).await;
    // A later file may hold it in the right shape.
    let (_, report) = fill(&model, &[&misshaped, &clip, &good], &[])
        .await
        .expect("is mended");
    assert!(report.holds("text_transformer.encoder.layer.0.output.dense.weight"));

    let mut twice = text.clone();
    pair(&mut twice, "bert.pooler.dense", &[WIDTH, WIDTH]);
    let twice = files.write("twice", &safetensors(&twice));
    refused(
        &model,
        &[&twice],
        &["bert.pooler.dense", "roberta.pooler.dense", "remove one"],
    )
    .await;
}

/// What `torch.save` writes around a pickle.
fn torch_zip(files: &Files, name: &str, pickle: &[u8], records: &[(&str, &[u8])]) -> String {
    let mut content = std::io::Cursor::new(Vec::new());
    let mut zip = zip::ZipWriter::new(&mut content);
    let stored = SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    let data = records
        .iter()
        .map(|(record, bytes)| (format!("archive/data/{record}"), *bytes));
    for (entry, bytes) in [("archive/data.pkl".to_owned(), pickle)]
        .into_iter()
        .chain(data)
    {
        zip.start_file(entry, stored).expect("starts");
        zip.write_all(bytes).expect("is written");
    }
    zip.finish().expect("is whole");
    files.write(name, &content.into_inner())
}

/// A state dict of one f32 tensor of two elements, with more items in front.
fn pickled(front: &[u8], key: &str) -> Vec<u8> {
    let mut pickle = b"\x80\x02}(".to_vec();
    pickle.extend(front);
    pickle.extend([b'X', key.len() as u8, 0, 0, 0]);
    pickle.extend(key.as_bytes());
    pickle.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\n");
    pickle.extend(b"X\x01\0\0\x000X\x03\0\0\0cpuK\x02tQK\0K\x02\x85K\x01\x85\x89NtRu.");
    pickle
}

#[tokio::test]
async fn a_pickle_is_read_and_never_run() {
    let files = Files::new();
    let name = "text_transformer.embeddings.LayerNorm.bias";
    let model = Targets::new([(name.to_owned(), vec![2])]);
    let two = bytes(&[1.5, -2.0]);
    let good = torch_zip(&files, "good", &pickled(b"", name), &[("0", &two)]);
    let (flat, _) = fill(&model, &[&good], &[]).await.expect("is read");
    assert_eq!(flat, [1.5, -2.0]);

    // An object of an unknown class beside the weights stays inert.
    let beside = b"X\x05\0\0\0hyperctrainer.options\nOptions\n)\x81}X\x01\0\0\0aK\x01sb";
    let lightning = torch_zip(&files, "lightning", &pickled(beside, name), &[("0", &two)]);
    let (flat, _) = fill(&model, &[&lightning], &[])
        .await
        .expect("is walked over");
    assert_eq!(flat, [1.5, -2.0]);

    // One that would run a command, if anything ran it, is named.
    let witness = files.0.path().join("witness");
    let command = format!("touch {}", witness.display());
    let mut attack = b"X\x01\0\0\0zcposix\nsystem\nX".to_vec();
    attack.extend((command.len() as u32).to_le_bytes());
    attack.extend(command.as_bytes());
    attack.extend(b"\x85R");
    let attack = torch_zip(&files, "attack", &pickled(&attack, name), &[("0", &two)]);
    let told = ["/attack", "posix.system", "nothing was executed"];
    let error = refused(&model, &[&attack], &told).await;
    assert!(matches!(error, WeightsError::Dangerous { .. }), "{error:?}");
    assert!(!witness.exists(), "nothing ran");

    // An unknown class where a weight belongs is refused as one.
    let strange =
        b"\x80\x02}X\x2a\0\0\0text_transformer.embeddings.LayerNorm.biasctrainer\nThing\n)\x81s.";
    let strange = torch_zip(&files, "strange", strange, &[]);
    refused(
        &model,
        &[&strange],
        &["/strange", name, "trainer.Thing", "floating-point"],
    )
    .await;
}

#[tokio::test]
async fn a_damaged_archive_is_named() {
    let files = Files::new();
    let name = "text_transformer.embeddings.LayerNorm.bias";
    let model = Targets::new([(name.to_owned(), vec![2])]);
    let pickle = pickled(b"", name);
    let short = torch_zip(&files, "short", &pickle, &[("0", &bytes(&[1.0]))]);
    refused(
        &model,
        &[&short],
        &["/short", "archive/data/0", "4 bytes for 2"],
    )
    .await;
    let gone = torch_zip(&files, "gone", &pickle, &[]);
    refused(&model, &[&gone], &["/gone", "archive/data/0"]).await;
    let broken = torch_zip(&files, "broken", &pickle[..40], &[]);
    refused(
        &model,
        &[&broken],
        &["/broken", "pickle at byte", "torch.save"],
    )
    .await;

    let whole = torch_zip(&files, "whole", &pickle, &[("0", &bytes(&[1.0, 2.0]))]);
    let mut content = std::fs::read(&whole).expect("was written");
    let half = files.write("half", &content[..content.len() / 2]);
    refused(&model, &[&half], &["/half", "damaged zip"]).await;
    let place = content
        .windows(4)
        .position(|w| w == 2.0f32.to_le_bytes())
        .expect("is there");
    content[place] ^= 1;
    let flipped = files.write("flipped", &content);
    refused(&model, &[&flipped], &["/flipped", "archive/data/0"]).await;
}
