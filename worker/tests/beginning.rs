//! A run that begins with another run's checkpoint: what each task takes of a pre-trained model, and
//! that nothing but the chosen bytes is begun with.

use std::collections::BTreeMap;
use std::path::Path;

use belfry_configs::{Init, ValidConfig, load};
use belfry_model::{ManagerTower, ParamTable, resize_positions};
use belfry_worker::checkpoint::folder;
use belfry_worker::state::hex;
use belfry_worker::weights::{Report, WeightsError, import};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;

const STEP: u64 = 7;
const POSITIONS: &str = "vit_model.visual.positional_embedding";
const TOKEN_TYPES: &str = "token_type_embeddings.weight";

fn config(settings: &[&str]) -> ValidConfig {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/tiny.toml");
    let settings: Vec<String> = settings.iter().map(|s| (*s).to_owned()).collect();
    load(&file, &settings).expect("a run file of this repository")
}

fn model(settings: &[&str]) -> ManagerTower {
    let config = config(settings);
    ManagerTower::new(&config.model, config.data.text_len as usize).expect("sizes that fit")
}

/// A pre-training run with one checkpoint of two parts.
struct Source {
    folder: TempDir,
    table: ParamTable,
    parameters: Vec<f32>,
    manifest_sha256: String,
}

impl Source {
    fn new() -> Self {
        let model = model(&[]);
        let table = model.table().clone();
        let parameters = table.init(99);
        let folder = tempfile::tempdir().expect("a folder");
        let mut source = Source {
            folder,
            table,
            parameters,
            manifest_sha256: String::new(),
        };
        std::fs::create_dir_all(source.checkpoint()).expect("is made");
        let entries = source.table.entries().len();
        let parts = [0..entries / 2, entries / 2..entries];
        let parts: Vec<serde_json::Value> = parts
            .into_iter()
            .enumerate()
            .map(|(part, range)| source.write_part(part, range))
            .collect();
        let manifest = json!({
            "schema_version": 1, "step": STEP, "run_id": "run", "parts": parts,
        });
        let text = serde_json::to_vec(&manifest).expect("plain data");
        source.manifest_sha256 = hex(&Sha256::digest(&text));
        std::fs::write(source.checkpoint().join("manifest.json"), text).expect("is written");
        source
    }

    fn checkpoint(&self) -> std::path::PathBuf {
        self.folder.path().join(folder(STEP))
    }

    /// Parameters and, as a checkpoint has them, moments: of these nothing is taken.
    fn write_part(&self, part: usize, range: std::ops::Range<usize>) -> serde_json::Value {
        let entries = &self.table.entries()[range];
        let bytes: BTreeMap<&str, Vec<u8>> = entries
            .iter()
            .map(|e| {
                let values = &self.parameters[e.offset..e.offset + e.len];
                let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
                (e.name.as_str(), bytes)
            })
            .collect();
        let nans: Vec<u8> = f32::NAN.to_le_bytes().repeat(self.parameters.len());
        let view = |shape: &[usize], bytes| {
            TensorView::new(Dtype::F32, shape.to_vec(), bytes).expect("a shape that fits")
        };
        let tensors = entries.iter().flat_map(|e| {
            let moment = &nans[..4 * e.len];
            [
                ("parameter", view(&e.shape, &bytes[e.name.as_str()][..])),
                ("exp_avg", view(&e.shape, moment)),
                ("exp_avg_sq", view(&e.shape, moment)),
            ]
            .map(|(kind, view)| (format!("{kind}/{}", e.name), view))
        });
        let bytes = safetensors::serialize(tensors, None).expect("fits");
        let sha256 = hex(&Sha256::digest(&bytes));
        let file = format!("{}.safetensors", &sha256[..32]);
        std::fs::write(self.checkpoint().join(&file), &bytes).expect("is written");
        json!({"part": part, "file": file, "sha256": sha256, "bytes": bytes.len()})
    }

    fn init(&self) -> Init {
        Init {
            run: Some(self.folder.path().display().to_string()),
            step: Some(STEP),
            manifest_sha256: Some(self.manifest_sha256.clone()),
            ..Init::default()
        }
    }

    fn values(&self, name: &str) -> &[f32] {
        let entry = self.table.get(name).expect("the source has it");
        &self.parameters[entry.offset..entry.offset + entry.len]
    }

    async fn laid_over(&self, model: &ManagerTower) -> Result<(Vec<f32>, Report), WeightsError> {
        let targets = model.table().into();
        import(&self.init(), &targets, model.table().init(0)).await
    }
}

fn of<'a>(flat: &'a [f32], table: &ParamTable, name: &str) -> &'a [f32] {
    let entry = table.get(name).expect("the model has it");
    &flat[entry.offset..entry.offset + entry.len]
}

/// First parts of the names that start from the seed, and of those of the checkpoint that are left.
fn roots<'a>(names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut roots: Vec<&str> = names
        .map(|name| name.split('.').next().unwrap_or(name))
        .collect();
    roots.sort_unstable();
    roots.dedup();
    roots
}

#[tokio::test]
async fn each_task_takes_the_pre_trained_part_and_starts_its_head_fresh() {
    let source = Source::new();
    let cases: [(&str, &[&str], &[&str]); 4] = [
        ("vqa", &["vqa_classifier"], &["itm_score", "mlm_score"]),
        ("snli_ve", &["snli_classifier"], &["itm_score", "mlm_score"]),
        ("nlvr2", &["nlvr2_classifier"], &["itm_score", "mlm_score"]),
        (
            "retrieval",
            &["cross_modal_itc_text_head", "cross_modal_itc_image_head"],
            &["mlm_score"],
        ),
    ];
    for (task, fresh, left) in cases {
        let model = model(&[&format!("model.task={task}"), "model.image.size=48"]);
        let (flat, report) = source.laid_over(&model).await.expect("fits");
        let found = roots(report.fresh.iter().map(String::as_str));
        for head in fresh {
            assert!(found.contains(head), "{task}: {head} is not in {found:?}");
        }
        let unused = roots(report.unused.iter().map(|unused| unused.key.as_str()));
        for head in left {
            assert!(unused.contains(head), "{task}: {head} is not in {unused:?}");
        }
        let table = model.table();
        for entry in table.entries().iter().filter(|e| report.holds(&e.name)) {
            let now = of(&flat, table, &entry.name);
            let expected = match entry.name.as_str() {
                POSITIONS => resize_positions(source.values(POSITIONS), 16, 3).expect("a square"),
                TOKEN_TYPES if task == "nlvr2" => {
                    let rows = source.values(TOKEN_TYPES);
                    [rows, &rows[rows.len() / 2..]].concat()
                }
                name => source.values(name).to_vec(),
            };
            assert_eq!(now, expected, "{task}: {}", entry.name);
        }
        assert!(report.holds(POSITIONS) && report.holds(TOKEN_TYPES));
        assert_eq!(report.holds("itm_score.fc.weight"), task == "retrieval");
    }
}

#[tokio::test]
async fn nothing_but_the_chosen_bytes_is_begun_with() {
    let source = Source::new();
    let model = model(&[]);
    source.laid_over(&model).await.expect("fits");
    let refused = async |words: &[&str]| {
        let told = source
            .laid_over(&model)
            .await
            .expect_err("refused")
            .to_string();
        for word in words {
            assert!(told.contains(word), "`{word}` is not in: {told}");
        }
    };
    let files = std::fs::read_dir(source.checkpoint()).expect("a folder");
    let mut parts: Vec<_> = files.flatten().map(|file| file.path()).collect();
    parts.retain(|path| path.extension().is_some_and(|e| e == "safetensors"));
    parts.sort();
    let whole = std::fs::read(&parts[0]).expect("is read");
    let mut flipped = whole.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    std::fs::write(&parts[0], flipped).expect("is written");
    refused(&[".safetensors", "sha256", "bring the checkpoint back"]).await;
    std::fs::remove_file(&parts[0]).expect("is removed");
    refused(&[".safetensors", "is missing"]).await;
    std::fs::write(&parts[0], whole).expect("is written");
    let manifest = source.checkpoint().join("manifest.json");
    let mut text = std::fs::read(&manifest).expect("is read");
    text.push(b'\n');
    std::fs::write(&manifest, text).expect("is written");
    refused(&["manifest.json", "this run begins with"]).await;

    let unpinned = Init {
        run: source.init().run,
        ..Init::default()
    };
    let targets = model.table().into();
    let told = import(&unpinned, &targets, model.table().init(0)).await;
    let told = told.expect_err("nobody chose").to_string();
    assert!(told.contains("no checkpoint of"), "{told}");
}
