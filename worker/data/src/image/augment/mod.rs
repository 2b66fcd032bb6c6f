//! RandomAugment (model_spec 10): a few operations drawn with replacement, each applied half of the
//! time. Knows the operations' arguments; refuses to know crops and normalisation.
//!
//! The authors' operations are OpenCV's and numpy's. They are followed to the bit, with what they
//! have of oddities, which stand beside the operations that have them.

mod colour;
mod sharpness;
mod warp;

use belfry_configs::rng::Key;

use super::pixels::Pixels;

/// Operations drawn an image (model_spec 10).
const DRAWN: u64 = 2;
/// Strength of every operation, of [`LEVEL_MAX`].
const LEVEL: f64 = 7.0;
const LEVEL_MAX: f64 = 10.0;

/// An operation without its arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Identity,
    AutoContrast,
    Brightness,
    Sharpness,
    Equalize,
    ShearX,
    ShearY,
    TranslateX,
    TranslateY,
    Rotate,
    Solarize,
    Color,
    Contrast,
    Posterize,
}

impl Kind {
    /// All, in the authors' order.
    pub const ALL: &[Kind] = &[
        Kind::Identity,
        Kind::AutoContrast,
        Kind::Brightness,
        Kind::Sharpness,
        Kind::Equalize,
        Kind::ShearX,
        Kind::ShearY,
        Kind::TranslateX,
        Kind::TranslateY,
        Kind::Rotate,
        Kind::Solarize,
        Kind::Color,
        Kind::Contrast,
        Kind::Posterize,
    ];
    /// Those that leave hues alone, so that questions about colours keep their answers.
    pub const WITHOUT_COLOUR: &[Kind] = Kind::ALL.split_at(10).0;

    /// The operation at `level` of 10; `negative` turns the direction of the geometric ones.
    pub fn at(self, level: f64, negative: bool) -> Op {
        let level = level / LEVEL_MAX;
        let enhanced = level * 1.8 + 0.1;
        let signed = |size: f64| if negative { -size } else { size };
        match self {
            Kind::Identity => Op::Identity,
            Kind::AutoContrast => Op::AutoContrast,
            Kind::Brightness => Op::Brightness(enhanced),
            Kind::Sharpness => Op::Sharpness(enhanced),
            Kind::Equalize => Op::Equalize,
            Kind::ShearX => Op::ShearX(signed(level * 0.3)),
            Kind::ShearY => Op::ShearY(signed(level * 0.3)),
            Kind::TranslateX => Op::TranslateX(signed(level * 10.0)),
            Kind::TranslateY => Op::TranslateY(signed(level * 10.0)),
            Kind::Rotate => Op::Rotate(signed(level * 30.0)),
            Kind::Solarize => Op::Solarize((level * 256.0) as u32),
            Kind::Color => Op::Color(enhanced),
            Kind::Contrast => Op::Contrast(enhanced),
            Kind::Posterize => Op::Posterize((level * 4.0) as u32),
        }
    }
}

/// An operation on 8-bit RGB pixels.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Op {
    /// Nothing.
    Identity,
    /// Each channel's values spread over all of 0..=255.
    AutoContrast,
    /// Values times a factor.
    Brightness(f64),
    /// Away from a smoothed picture, by a factor.
    Sharpness(f64),
    /// Each channel's values made equally frequent.
    Equalize,
    /// Rows shifted by a share of their number.
    ShearX(f64),
    /// Columns shifted by a share of their number.
    ShearY(f64),
    /// To the left, in pixels.
    TranslateX(f64),
    /// Up, in pixels.
    TranslateY(f64),
    /// Anti-clockwise, in degrees.
    Rotate(f64),
    /// Values from a threshold on are inverted.
    Solarize(u32),
    /// Away from grey, by a factor.
    Color(f64),
    /// Away from the mean, by a factor.
    Contrast(f64),
    /// Only this many upper bits of a value are kept.
    Posterize(u32),
}

impl Op {
    /// Changes `pixels`, whose size stays.
    pub fn apply(self, pixels: &mut Pixels<3>) {
        match self {
            Op::Identity => {}
            Op::AutoContrast => colour::auto_contrast(pixels),
            Op::Brightness(factor) => colour::brightness(pixels, factor),
            Op::Sharpness(factor) => sharpness::sharpness(pixels, factor),
            Op::Equalize => colour::equalize(pixels),
            Op::ShearX(share) => warp::shear_x(pixels, share),
            Op::ShearY(share) => warp::shear_y(pixels, share),
            Op::TranslateX(offset) => warp::translate(pixels, offset, 0.0),
            Op::TranslateY(offset) => warp::translate(pixels, 0.0, offset),
            Op::Rotate(degrees) => warp::rotate(pixels, degrees),
            Op::Solarize(threshold) => colour::solarize(pixels, threshold),
            Op::Color(factor) => colour::colour(pixels, factor),
            Op::Contrast(factor) => colour::contrast(pixels, factor),
            Op::Posterize(bits) => colour::posterize(pixels, bits),
        }
    }
}

/// RandomAugment(2, 7) over `kinds`.
pub fn random(pixels: &mut Pixels<3>, kinds: &[Kind], key: Key) {
    for drawn in 0..DRAWN {
        let key = key.with(drawn);
        let kind = kinds[key.below(0, kinds.len() as u64) as usize];
        if key.uniform(1) < 0.5 {
            kind.at(LEVEL, key.uniform(2) < 0.5).apply(pixels);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use belfry_configs::rng::Purpose;

    #[test]
    fn arguments_at_level_seven_are_the_papers() {
        let all: Vec<Op> = Kind::ALL.iter().map(|kind| kind.at(LEVEL, true)).collect();
        assert_eq!(
            all,
            [
                Op::Identity,
                Op::AutoContrast,
                Op::Brightness(1.36),
                Op::Sharpness(1.36),
                Op::Equalize,
                Op::ShearX(-0.21),
                Op::ShearY(-0.21),
                Op::TranslateX(-7.0),
                Op::TranslateY(-7.0),
                Op::Rotate(-21.0),
                Op::Solarize(179),
                Op::Color(1.36),
                Op::Contrast(1.36),
                Op::Posterize(2),
            ]
        );
        assert_eq!(Kind::WITHOUT_COLOUR.last(), Some(&Kind::Rotate));
    }

    #[test]
    fn half_of_the_drawn_operations_are_applied_and_the_key_says_which() {
        let before = Pixels::<3> {
            width: 8,
            height: 8,
            data: (0..192).map(|v| (v * 7 % 200) as u8).collect(),
        };
        let after = |case: u64| {
            let mut pixels = before.clone();
            let key = Key::new(1, Purpose::Pack).with(case);
            random(&mut pixels, &Kind::ALL[1..], key);
            pixels
        };
        let unchanged = (0..1000).filter(|case| after(*case) == before).count();
        assert!((200..310).contains(&unchanged), "{unchanged} of 1000");
        assert_eq!(after(5), after(5));
    }
}
