//! How large a model is: parameters, multiply-accumulates and activations per module, as functions
//! of its sizes alone (paper Table 6, model_spec 16).
//!
//! No tensor is made: a model of any size is counted at once. Counted is the encoder up to
//! `cls_feats` without any task's head, as in Table 6; unused tensors that the authors' model holds
//! are counted as parameters too. [`Fusion`] names the systems that the paper compares; it refuses to
//! know more of a configuration than sizes.

/// Multiply-accumulates that one element of a layer norm counts for, scale and shift included. What
/// Table 6's counter (fvcore) takes for it.
const NORM_MACS: u64 = 5;
/// Elements of CLIP's text side in the authors' model: a position table 77 x 512 and a norm of 512.
const CLIP_LEFTOVERS: u64 = 77 * 512 + 2 * 512;
/// CLIP's and ViT's feed-forward width over their own width.
const IMAGE_MLP_RATIO: u64 = 4;
/// Bytes of an f32.
const F32: u64 = 4;

/// How uni-modal layers reach the cross-modal ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fusion {
    /// BridgeTower: link towers, one managed layer per cross-modal layer.
    BridgeTower,
    /// Managers.
    Managers {
        /// In the cross-modal layers above the first.
        query: Query,
        /// Elements of a weight: 1 (`scalar`) or the width (`vector`).
        vector: bool,
    },
}

/// What a manager's scores come from; the first layer's are static always.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Query {
    /// SAUE: learned, no query.
    Static,
    /// AAUE with the own stream's previous output as query.
    Visual,
    /// AAUE with that and what it attends to in the other stream.
    Fused,
}

/// Sizes of a model and of what it reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModelSize {
    /// The text tower.
    pub text: TextSize,
    /// The image tower.
    pub image: ImageSize,
    /// Width of the cross-modal layers.
    pub hidden: u64,
    /// Attention heads of the cross-modal layers.
    pub heads: u64,
    /// Cross-modal layers per stream.
    pub cross_layers: u64,
    /// Their feed-forward width over `hidden`.
    pub mlp_ratio: u64,
    /// What stands between the towers and them.
    pub fusion: Fusion,
}

/// RoBERTa or BERT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TextSize {
    /// Layers.
    pub layers: u64,
    /// Layers whose outputs are used.
    pub managed: u64,
    /// Width.
    pub hidden: u64,
    /// Attention heads.
    pub heads: u64,
    /// Feed-forward width.
    pub intermediate: u64,
    /// Rows of the word table.
    pub vocab: u64,
    /// Rows of the position table.
    pub positions: u64,
    /// Rows of the token-type table.
    pub types: u64,
    /// Tokens of a caption.
    pub length: u64,
}

/// CLIP's ViT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageSize {
    /// Blocks.
    pub layers: u64,
    /// Blocks whose outputs are used.
    pub managed: u64,
    /// Width.
    pub hidden: u64,
    /// Attention heads.
    pub heads: u64,
    /// Side of the picture in pixels.
    pub side: u64,
    /// Side of a patch in pixels.
    pub patch: u64,
}

impl ImageSize {
    /// Tokens: patches and the class token.
    fn length(&self) -> u64 {
        let grid = self.side / self.patch;
        grid * grid + 1
    }
}

/// A module's share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Share {
    /// Elements of its parameters.
    pub parameters: u64,
    /// Multiply-accumulates of one pass over one pair: linear layers, matrix products, convolution
    /// and layer norms. The paper calls them FLOPs; real operations are about twice as many.
    pub macs: u64,
    /// f32 elements that one pair's backward pass must find: inputs of linear layers, norms and
    /// activations, both sides of attention's products. Dropout masks are drawn again or are bits.
    pub activations: u64,
}

impl std::ops::Add for Share {
    type Output = Share;
    fn add(self, other: Share) -> Share {
        Share {
            parameters: self.parameters + other.parameters,
            macs: self.macs + other.macs,
            activations: self.activations + other.activations,
        }
    }
}

impl std::ops::Mul<u64> for Share {
    type Output = Share;
    fn mul(self, times: u64) -> Share {
        Share {
            parameters: self.parameters * times,
            macs: self.macs * times,
            activations: self.activations * times,
        }
    }
}

impl std::iter::Sum for Share {
    fn sum<I: Iterator<Item = Share>>(shares: I) -> Share {
        shares.fold(Share::default(), |a, b| a + b)
    }
}

impl Share {
    /// Without parameters: the same module used once more.
    fn again(self) -> Share {
        Share {
            parameters: 0,
            ..self
        }
    }
}

/// A row of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModuleSize {
    /// The module.
    pub name: &'static str,
    /// Its share.
    pub share: Share,
}

/// Shares by module, in the order of a forward pass.
pub fn modules(size: &ModelSize) -> Vec<ModuleSize> {
    let (text, image) = (size.text.length, size.image.length());
    let row = |name, share| ModuleSize { name, share };
    vec![
        row("text tower", text_tower(&size.text)),
        row("image tower", image_tower(&size.image)),
        row(
            "text transform",
            transform(size, &[size.text.hidden, size.text.managed, text]),
        ),
        row(
            "image transform",
            transform(size, &[size.image.hidden, size.image.managed, image]),
        ),
        row("embeddings", embeddings(size)),
        row(
            "text managers",
            fusion(size, size.text.managed, text, image),
        ),
        row(
            "image managers",
            fusion(size, size.image.managed, image, text),
        ),
        row(
            "text cross layers",
            cross_layer(size, text, image) * size.cross_layers,
        ),
        row(
            "image cross layers",
            cross_layer(size, image, text) * size.cross_layers,
        ),
        row(
            "poolers",
            linear(1, size.hidden, size.hidden) * 2 + kept(2 * size.hidden),
        ),
        row("unused", unused(size)),
    ]
}

/// The whole.
pub fn total(modules: &[ModuleSize]) -> Share {
    modules.iter().map(|module| module.share).sum()
}

/// Bytes that training holds for `parameters` elements: weights, gradients and AdamW's two moments,
/// all f32.
pub fn state_bytes(parameters: u64) -> [(&'static str, u64); 3] {
    [
        ("parameters", F32 * parameters),
        ("gradients", F32 * parameters),
        ("AdamW's moments", 2 * F32 * parameters),
    ]
}

/// Bytes of the activations of `pairs` pairs in one forward pass.
pub fn activation_bytes(share: Share, pairs: u64) -> u64 {
    F32 * share.activations * pairs
}

/// `[rows, inputs] x [inputs, outputs] + bias`.
fn linear(rows: u64, inputs: u64, outputs: u64) -> Share {
    Share {
        parameters: inputs * outputs + outputs,
        macs: rows * inputs * outputs,
        activations: rows * inputs,
    }
}

/// A layer norm over `width`, on `rows` rows.
fn norm(rows: u64, width: u64) -> Share {
    Share {
        parameters: 2 * width,
        macs: NORM_MACS * rows * width,
        activations: rows * width,
    }
}

/// Parameters alone.
fn held(parameters: u64) -> Share {
    Share {
        parameters,
        ..Share::default()
    }
}

/// Activations alone.
fn kept(activations: u64) -> Share {
    Share {
        activations,
        ..Share::default()
    }
}

/// Self-attention or cross-attention of `rows` queries on `keys` keys, with its four projections.
fn attention(rows: u64, keys: u64, width: u64, heads: u64) -> Share {
    // Keys and values share their input.
    let projections = linear(rows, width, width) * 2 + linear(keys, width, width) * 2;
    let shared = if rows == keys { 2 } else { 1 } * keys * width;
    let products = Share {
        parameters: 0,
        macs: 2 * rows * keys * width,
        // Queries, keys, values and the softmax's output.
        activations: rows * width + 2 * keys * width + heads * rows * keys,
    };
    let sum = projections + products;
    Share {
        activations: sum.activations - shared,
        ..sum
    }
}

/// Two linear layers around an activation.
fn feed_forward(rows: u64, width: u64, inside: u64) -> Share {
    linear(rows, width, inside) + linear(rows, inside, width) + kept(rows * inside)
}

fn text_tower(size: &TextSize) -> Share {
    let (length, width) = (size.length, size.hidden);
    let tables = held((size.vocab + size.positions + size.types) * width);
    let layer = attention(length, length, width, size.heads)
        + feed_forward(length, width, size.intermediate)
        + norm(length, width) * 2;
    tables + norm(length, width) + layer * size.layers
}

fn image_tower(size: &ImageSize) -> Share {
    let (length, width) = (size.length(), size.hidden);
    let patches = linear(length - 1, 3 * size.patch * size.patch, width);
    let convolution = Share {
        // Without bias.
        parameters: patches.parameters - width,
        ..patches
    };
    let block = attention(length, length, width, size.heads)
        + feed_forward(length, width, IMAGE_MLP_RATIO * width)
        + norm(length, width) * 2;
    // One norm behind all managed blocks.
    let after = norm(length, width);
    convolution
        + held(width + length * width)
        + norm(length, width)
        + block * size.layers
        + after
        + (after * (size.managed - 1)).again()
}

/// One linear layer on every used layer of a tower: `[width, used layers, length]`.
fn transform(size: &ModelSize, [width, managed, length]: &[u64; 3]) -> Share {
    let once = linear(*length, *width, size.hidden);
    once + (once * (managed - 1)).again()
}

/// Token types, and the layer embeddings of managers.
fn embeddings(size: &ModelSize) -> Share {
    let layers = match size.fusion {
        Fusion::BridgeTower => 0,
        Fusion::Managers { .. } => size.text.layers + size.image.layers,
    };
    held((2 + layers) * size.hidden)
}

/// Everything between one stream's transform and its cross-modal layers.
fn fusion(size: &ModelSize, experts: u64, length: u64, other: u64) -> Share {
    let width = size.hidden;
    let one = norm(length, width);
    let above = size.cross_layers - 1;
    let Fusion::Managers { query, vector } = size.fusion else {
        return one * size.cross_layers;
    };
    let weight = if vector { width } else { 1 };
    // Experts' norms, the weighted sum, two temperatures of which one is used.
    let first = one * experts + held(experts * weight + 2);
    let norms = one * (experts + 1);
    let scores = match query {
        Query::Static => held((experts + 1) * weight + 2),
        // The adaptive manager of this kind has one temperature.
        Query::Visual => linear(length, width, experts) + held(weight + 1),
        Query::Fused => {
            let gates = linear(length, 2 * width, experts);
            // One head, no value and no output projection.
            let attended = Share {
                parameters: 0,
                macs: 2 * length * other * width,
                activations: (length + other) * width + length * other,
            };
            linear(length, width, width)
                + linear(other, width, width)
                + norm(other, width)
                + attended
                + gates
                + held(weight + 2)
        }
    };
    // The softmax over experts of adaptive scores, per token.
    let adaptive = if query == Query::Static {
        0
    } else {
        length * experts
    };
    first + (norms + scores + kept(adaptive)) * above
}

fn cross_layer(size: &ModelSize, rows: u64, other: u64) -> Share {
    let (width, heads) = (size.hidden, size.heads);
    attention(rows, rows, width, heads)
        + attention(rows, other, width, heads)
        + feed_forward(rows, width, size.mlp_ratio * width)
        + norm(rows, width) * 3
}

/// What the authors' model holds and nothing reads: the text tower's pooler, CLIP's leftovers, the
/// temperature of the contrastive loss.
fn unused(size: &ModelSize) -> Share {
    let width = size.text.hidden;
    held(width * width + width + CLIP_LEFTOVERS + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn base(fusion: Fusion) -> ModelSize {
        ModelSize {
            text: TextSize {
                layers: 12,
                managed: 6,
                hidden: 768,
                heads: 12,
                intermediate: 3072,
                vocab: 50265,
                positions: 514,
                types: 1,
                length: 50,
            },
            image: ImageSize {
                layers: 12,
                managed: 6,
                hidden: 768,
                heads: 12,
                side: 384,
                patch: 16,
            },
            hidden: 768,
            heads: 12,
            cross_layers: 6,
            mlp_ratio: 4,
            fusion,
        }
    }

    fn managers(query: Query) -> Fusion {
        Fusion::Managers {
            query,
            vector: true,
        }
    }

    /// Paper Table 6 in its units, and the exact counts behind it (model_spec 16).
    #[test]
    fn table_6_is_reproduced() {
        let rows = [
            (
                "BridgeTower",
                Fusion::BridgeTower,
                326_580_993,
                101_253_526_272,
                ["326.58", "101.25"],
            ),
            (
                "SAUE",
                managers(Query::Static),
                326_769_945,
                101_337_795_072,
                ["326.77", "101.34"],
            ),
            (
                "AAUE visual",
                managers(Query::Visual),
                326_769_995,
                101_352_241_152,
                ["326.77", "101.35"],
            ),
            (
                "AAUE fused",
                managers(Query::Fused),
                338_643_285,
                105_520_058_112,
                ["338.64", "105.52"],
            ),
        ];
        for (name, fusion, parameters, macs, paper) in rows {
            let whole = total(&modules(&base(fusion)));
            let millions = format!("{:.2}", whole.parameters as f64 / 1e6);
            let billions = format!("{:.2}", whole.macs as f64 / 1e9);
            println!("{name:<12} {millions} M parameters  {billions} G FLOPs");
            assert_eq!((whole.parameters, whole.macs), (parameters, macs), "{name}");
            assert_eq!([millions.as_str(), billions.as_str()], paper, "{name}");
        }
    }

    /// Model_spec 16's breakdown.
    #[test]
    fn modules_have_their_share() {
        let modules = modules(&base(managers(Query::Fused)));
        let share = |name: &str| {
            let found = modules.iter().find(|m| m.name == name);
            found.expect("is a row").share
        };
        assert_eq!(share("text tower").parameters, 39_000_576 + 85_054_464);
        assert_eq!(
            share("image tower").parameters,
            85_054_464 + 589_824 + 443_136 + 768 + 3_072
        );
        assert_eq!(share("text cross layers").parameters, 56_710_656);
        assert_eq!(share("image managers").parameters, 6_031_146);
        assert_eq!(share("text transform").parameters, 590_592);
        assert_eq!(share("embeddings").parameters, 2 * 9_216 + 1_536);
        assert_eq!(share("unused").parameters, 39_424 + 1_024 + 590_592 + 1);
        let giga = |name: &str| (share(name).macs as f64 / 1e7).round() / 100.0;
        assert_eq!(giga("image tower"), 55.55);
        assert_eq!(giga("text tower"), 4.30);
        assert_eq!(giga("image cross layers"), 32.32);
        assert_eq!(giga("text cross layers"), 6.85);
    }

    #[test]
    fn activations_of_a_small_attention_are_counted_by_hand() {
        // 3 queries on 3 keys, width 4, 2 heads: the input once (12), q, k, v (36), softmax (18), the
        // output projection's input (12).
        assert_eq!(attention(3, 3, 4, 2).activations, 12 + 36 + 18 + 12);
        // 3 on 5: both inputs (12 + 20), q (12), k and v (40), softmax (30), output's input (12).
        assert_eq!(attention(3, 5, 4, 2).activations, 32 + 12 + 40 + 30 + 12);
    }
}
