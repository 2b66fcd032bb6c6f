//! 8-bit pixels to the numbers that the image tower reads. Knows one mean and one deviation.

use std::sync::LazyLock;

use super::pixels::Pixels;

/// CLIP's mean and standard deviation per channel (model_spec 10), to the last bit of an f32.
const MEAN: [f32; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
const STD: [f32; 3] = [0.268_629_54, 0.261_302_6, 0.275_777_1];

/// `(v / 255 - mean) / std` of every value and channel: two divisions a pixel less.
static TABLE: LazyLock<[[f32; 256]; 3]> = LazyLock::new(|| {
    std::array::from_fn(|channel| {
        std::array::from_fn(|v| (v as f32 / 255.0 - MEAN[channel]) / STD[channel])
    })
});

/// Appends `[3, height, width]`.
pub fn append(pixels: &Pixels<3>, out: &mut Vec<f32>) {
    out.reserve(pixels.data.len());
    for (channel, table) in TABLE.iter().enumerate() {
        let all = pixels.data.as_chunks::<3>().0.iter();
        out.extend(all.map(|pixel| table[usize::from(pixel[channel])]));
    }
}
