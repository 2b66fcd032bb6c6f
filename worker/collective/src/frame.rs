//! The one frame format on the wire: a fixed header with a checksum over header and payload.
//!
//! Knows nothing of what the floats mean. Refuses a length before it allocates for it.

use std::io;

use belfry_proto::LaneRange;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};

use crate::digest::bytes_of;

/// "BFR1", little-endian; also the version of the format.
const MAGIC: u32 = u32::from_le_bytes(*b"BFR1");
/// Bytes of a header: the sum of the fields in [`Header::to_bytes`].
pub const HEADER_BYTES: usize = 64;

/// A byte stream between two members: TCP, or memory in tests.
pub trait Link: AsyncRead + AsyncWrite + Send + Unpin + 'static {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> Link for T {}
/// A link of either kind.
pub type BoxLink = Box<dyn Link>;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// First on a connection; `bucket` is the dialler's rank.
    Hello = 1,
    /// A slice of one node of a bucket, to the bucket's owner.
    Part = 2,
    /// A slice of a bucket's sum, from its owner.
    Sum = 3,
    /// Nothing to say yet, but alive.
    Alive = 4,
    /// The sender has sent all of this exchange.
    Done = 5,
    /// The connection is refused; run and generation are the acceptor's.
    Refused = 6,
    /// Asks for floats of a state: `bucket` is the tensor, `node.end` the number of floats.
    StateRequest = 7,
    /// The floats.
    StateChunk = 8,
    /// The asked step is not here.
    StateGone = 9,
    /// A slice of a lane's block: `bucket` is the lane.
    Block = 11,
    /// Asks for the digests of all slices of a state; the answer has them, 16 bytes each.
    StateDigests = 10,
}

impl Kind {
    fn from_wire(value: u32) -> Option<Self> {
        use Kind::*;
        let all = [
            Hello,
            Part,
            Sum,
            Alive,
            Done,
            Refused,
            StateRequest,
            StateChunk,
            StateGone,
            StateDigests,
            Block,
        ];
        all.into_iter().find(|kind| *kind as u32 == value)
    }
}

/// The fields before a payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What follows.
    pub kind: Kind,
    /// The run.
    pub run_id: u64,
    /// Fencing.
    pub generation: u64,
    /// The open step.
    pub step: u64,
    /// Bucket, tensor, lane or rank.
    pub bucket: u32,
    /// Tree node of a part.
    pub node: LaneRange,
    /// In floats, from the start of the bucket, tensor or block.
    pub offset: u64,
    /// Payload bytes; set by [`encode`].
    pub bytes: u32,
}

impl Header {
    /// A header that names only the exchange.
    pub fn new(kind: Kind, run_id: u64, generation: u64, step: u64) -> Self {
        let node = LaneRange { start: 0, end: 0 };
        Header {
            kind,
            run_id,
            generation,
            step,
            bucket: 0,
            node,
            offset: 0,
            bytes: 0,
        }
    }

    fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        out[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        out[4..8].copy_from_slice(&(self.kind as u32).to_le_bytes());
        out[8..16].copy_from_slice(&self.run_id.to_le_bytes());
        out[16..24].copy_from_slice(&self.generation.to_le_bytes());
        out[24..32].copy_from_slice(&self.step.to_le_bytes());
        out[32..36].copy_from_slice(&self.bucket.to_le_bytes());
        out[36..40].copy_from_slice(&self.node.start.to_le_bytes());
        out[40..44].copy_from_slice(&self.node.end.to_le_bytes());
        out[44..52].copy_from_slice(&self.offset.to_le_bytes());
        out[52..56].copy_from_slice(&self.bytes.to_le_bytes());
        out
    }
}

/// A frame that arrived intact.
#[derive(Debug)]
pub struct Frame {
    /// Its fields.
    pub header: Header,
    /// `header.bytes` bytes.
    pub payload: Vec<u8>,
}

/// Why a frame could not be read.
#[derive(Debug)]
pub enum ReadError {
    /// The link failed or ended.
    Io(io::Error),
    /// What came is not a sound frame; bucket and offset as its header claims.
    Corrupt {
        bucket: u32,
        offset: u64,
        reason: String,
    },
}

/// Header, checksum and the little-endian bytes of `floats`.
pub fn encode(header: Header, floats: &[f32]) -> Vec<u8> {
    encode_bytes(header, &bytes_of(floats))
}

/// Header, checksum and these bytes, a multiple of four.
pub fn encode_bytes(mut header: Header, payload: &[u8]) -> Vec<u8> {
    header.bytes = payload.len() as u32;
    let mut out = Vec::with_capacity(HEADER_BYTES + payload.len());
    out.extend_from_slice(&header.to_bytes());
    out.extend_from_slice(payload);
    let crc = checksum(&out[..HEADER_BYTES - 4], payload);
    out[HEADER_BYTES - 4..HEADER_BYTES].copy_from_slice(&crc.to_le_bytes());
    out
}

/// The floats of a payload whose length was checked to be a multiple of four.
pub fn floats(payload: &[u8]) -> impl Iterator<Item = f32> + '_ {
    let word = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
    payload.chunks_exact(4).map(word)
}

/// Reads one frame and not a byte more.
///
/// # Errors
/// [`ReadError`]; a payload above `bytes_max` is refused before it is read.
pub async fn read_frame(
    link: &mut (impl AsyncRead + Unpin + ?Sized),
    bytes_max: usize,
) -> Result<Frame, ReadError> {
    let (raw, header) = read_header(link, bytes_max).await?;
    let mut payload = vec![0; header.bytes as usize];
    link.read_exact(&mut payload).await.map_err(ReadError::Io)?;
    check(&raw, header, &payload)?;
    Ok(Frame { header, payload })
}

/// Reads one frame whose floats belong into `into`, without another copy of them. A frame without
/// payload leaves `into` as it is; what a frame that is not sound leaves there means nothing.
///
/// # Errors
/// [`ReadError`]; a payload of another length is refused before it is read.
pub async fn read_into(
    link: &mut (impl AsyncRead + Unpin + ?Sized),
    into: &mut [f32],
) -> Result<Header, ReadError> {
    let (raw, header) = read_header(link, into.len() * 4).await?;
    let bytes: &mut [u8] = bytemuck::cast_slice_mut(into);
    if header.bytes as usize == bytes.len() {
        link.read_exact(bytes).await.map_err(ReadError::Io)?;
        check(&raw, header, bytes)?;
    } else if header.bytes == 0 {
        check(&raw, header, &[])?;
    } else {
        return Err(ReadError::Corrupt {
            bucket: header.bucket,
            offset: header.offset,
            reason: format!("{} bytes instead of {}", header.bytes, bytes.len()),
        });
    }
    if cfg!(target_endian = "big") {
        into.iter_mut()
            .for_each(|x| *x = f32::from_bits(x.to_bits().swap_bytes()));
    }
    Ok(header)
}

fn check(raw: &[u8; HEADER_BYTES], header: Header, payload: &[u8]) -> Result<(), ReadError> {
    let told = &raw[HEADER_BYTES - 4..];
    if checksum(&raw[..HEADER_BYTES - 4], payload).to_le_bytes() == told {
        return Ok(());
    }
    Err(ReadError::Corrupt {
        bucket: header.bucket,
        offset: header.offset,
        reason: "the checksum does not match".into(),
    })
}

async fn read_header(
    link: &mut (impl AsyncRead + Unpin + ?Sized),
    bytes_max: usize,
) -> Result<([u8; HEADER_BYTES], Header), ReadError> {
    let mut raw = [0; HEADER_BYTES];
    link.read_exact(&mut raw).await.map_err(ReadError::Io)?;
    let u32_at = |at: usize| u32::from_le_bytes([raw[at], raw[at + 1], raw[at + 2], raw[at + 3]]);
    let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
    let (bucket, offset, bytes) = (u32_at(32), u64_at(44), u32_at(52));
    let corrupt = |reason: String| ReadError::Corrupt {
        bucket,
        offset,
        reason,
    };
    if u32_at(0) != MAGIC {
        return Err(corrupt(format!("magic {:08x}", u32_at(0))));
    }
    let Some(kind) = Kind::from_wire(u32_at(4)) else {
        return Err(corrupt(format!("kind {}", u32_at(4))));
    };
    if bytes as usize > bytes_max || bytes % 4 != 0 {
        return Err(corrupt(format!(
            "a payload of {bytes} bytes, at most {bytes_max} allowed"
        )));
    }
    let header = Header {
        kind,
        run_id: u64_at(8),
        generation: u64_at(16),
        step: u64_at(24),
        bucket,
        node: LaneRange {
            start: u32_at(36),
            end: u32_at(40),
        },
        offset,
        bytes,
    };
    Ok((raw, header))
}

fn checksum(header: &[u8], payload: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(header), payload)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header() -> Header {
        let mut header = Header::new(Kind::Part, 7, 8, 9);
        header.bucket = 3;
        header.node = LaneRange { start: 4, end: 6 };
        header.offset = 1 << 40;
        header
    }

    fn read(bytes: &[u8]) -> Result<Frame, ReadError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .expect("runtime");
        runtime.block_on(async { read_frame(&mut &bytes[..], 1 << 10).await })
    }

    #[test]
    fn a_frame_comes_back() {
        let values = [1.0, f32::NAN, -0.0, f32::MIN_POSITIVE];
        let frame = read(&encode(header(), &values)).expect("intact");
        assert_eq!(
            frame.header,
            Header {
                bytes: 16,
                ..header()
            }
        );
        let bits: Vec<u32> = floats(&frame.payload).map(f32::to_bits).collect();
        assert_eq!(bits, values.map(f32::to_bits));
    }

    #[test]
    fn an_absurd_length_is_refused_before_its_payload_is_read() {
        let mut bytes = encode(header(), &[1.0]);
        bytes[52..56].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(
            read(&bytes),
            Err(ReadError::Corrupt { bucket: 3, .. })
        ));
    }

    proptest! {
        #[test]
        fn any_flipped_bit_is_noticed(byte in 0usize..HEADER_BYTES + 12, bit in 0u32..8) {
            let mut bytes = encode(header(), &[1.0, 2.0, 3.0]);
            bytes[byte] ^= 1 << bit;
            prop_assert!(read(&bytes).is_err());
        }
    }
}
