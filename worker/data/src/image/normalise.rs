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
    let plane = pixels.width * pixels.height;
    let first = out.len();
    out.resize(first + 3 * plane, 0.0);
    let table = &*TABLE;
    let (red, rest) = out[first..].split_at_mut(plane);
    let (green, blue) = rest.split_at_mut(plane);
    let all = pixels.data.as_chunks::<3>().0.iter();
    for (((pixel, r), g), b) in all.zip(red).zip(green).zip(blue) {
        *r = table[0][usize::from(pixel[0])];
        *g = table[1][usize::from(pixel[1])];
        *b = table[2][usize::from(pixel[2])];
    }
}
