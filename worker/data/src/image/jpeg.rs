//! JPEG files on their way into a batch. Knows what the configuration says of those that end too
//! early; refuses to know how they are decoded.

use belfry_configs::TruncatedJpeg;
use shard_tools::jpeg;

use super::buffers;
use super::pixels::Pixels;

/// Decodes; with [`TruncatedJpeg::Pad`] a file that ends after its header is grey where it ends.
///
/// # Errors
/// A reason.
pub fn decode(bytes: &[u8], truncated: TruncatedJpeg) -> Result<Pixels<3>, String> {
    let picture = jpeg::decode(bytes, buffers::take)?;
    if picture.cut_off && truncated == TruncatedJpeg::Refuse {
        return Err(
            "the JPEG ends before its last row; data.truncated_jpeg = \"pad\" takes what there is"
                .into(),
        );
    }
    Ok(Pixels {
        width: picture.width,
        height: picture.height,
        data: picture.data,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_off_file_is_refused_or_padded_and_nothing_of_the_picture_before_shows() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../../data/stamps/badger.jpg");
        let file = std::fs::read(file).expect("a photograph of the house");
        let cut = &file[..file.len() / 2];
        let reason = decode(cut, TruncatedJpeg::Refuse).expect_err("is refused");
        assert!(reason.contains("data.truncated_jpeg"), "{reason}");
        let first = decode(cut, TruncatedJpeg::Pad).expect("decodes");
        buffers::give(vec![77; first.data.len()]);
        assert_eq!(decode(cut, TruncatedJpeg::Pad).expect("decodes"), first);
    }
}
