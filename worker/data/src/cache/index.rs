//! A shard's index as it is held: a few dozen bytes a sample, and pair to sample by halving.

use shard_tools::manifest::{Member, SampleEntry, ShardIndex};

/// A member's name is its sample's key with one of few suffixes; a name that is not stands whole.
struct Suffix {
    text: Box<str>,
    behind_key: bool,
}

/// Where a member's data lie.
struct Place {
    offset: u64,
    bytes: u64,
    suffix: u32,
}

/// One shard's samples in the order of the tar.
pub struct Index {
    /// All keys, one behind the other.
    keys: String,
    /// Where sample i's key, members and pairs end; they begin where those of i - 1 end.
    ends: Vec<Ends>,
    /// Of each sample the images, then the text.
    places: Vec<Place>,
    suffixes: Vec<Suffix>,
}

struct Ends {
    key: u32,
    places: u32,
    pairs: u32,
    source: u32,
}

impl Index {
    /// # Errors
    /// What does not fit: more than 4 GiB of keys, 2^32 pairs or members.
    pub(super) fn of(index: &ShardIndex) -> Result<Self, std::num::TryFromIntError> {
        let mut held = Index {
            keys: String::new(),
            ends: Vec::with_capacity(index.samples.len()),
            places: Vec::with_capacity(2 * index.samples.len()),
            suffixes: Vec::new(),
        };
        let mut pairs = 0u64;
        for sample in &index.samples {
            held.keys.push_str(&sample.key);
            for member in sample.images.iter().chain([&sample.text]) {
                let suffix = held.suffix(sample, member)?;
                held.places.push(Place {
                    offset: member.offset,
                    bytes: member.bytes,
                    suffix,
                });
            }
            pairs += u64::from(sample.pairs);
            held.ends.push(Ends {
                key: held.keys.len().try_into()?,
                places: held.places.len().try_into()?,
                pairs: pairs.try_into()?,
                source: sample.source,
            });
        }
        held.keys.shrink_to_fit();
        held.places.shrink_to_fit();
        Ok(held)
    }

    fn suffix(
        &mut self,
        sample: &SampleEntry,
        member: &Member,
    ) -> Result<u32, std::num::TryFromIntError> {
        let behind = member.name.strip_prefix(&sample.key);
        let (text, behind_key) = match behind {
            Some(text) => (text, true),
            None => (&*member.name, false),
        };
        let mut known = self.suffixes.iter();
        let found = known.position(|s| s.behind_key == behind_key && &*s.text == text);
        let place = found.unwrap_or(self.suffixes.len());
        if found.is_none() {
            self.suffixes.push(Suffix {
                text: text.into(),
                behind_key,
            });
        }
        place.try_into()
    }

    /// Bytes that it holds.
    pub fn bytes(&self) -> usize {
        let suffixes = self.suffixes.iter();
        let suffixes: usize = suffixes.map(|s| size_of::<Suffix>() + s.text.len()).sum();
        size_of::<Self>()
            + self.keys.capacity()
            + self.ends.capacity() * size_of::<Ends>()
            + self.places.capacity() * size_of::<Place>()
            + suffixes
    }

    /// Number of samples.
    pub fn samples(&self) -> usize {
        self.ends.len()
    }

    /// (sample, pair in it) of the shard's pair number `pair`.
    ///
    /// # Panics
    /// Where the shard has no such pair.
    pub fn sample_of(&self, pair: u32) -> (usize, usize) {
        let sample = self.ends.partition_point(|ends| ends.pairs <= pair);
        assert!(sample < self.samples(), "the shard has no pair {pair}");
        (
            sample,
            (pair - self.first(sample, |ends| ends.pairs)) as usize,
        )
    }

    /// Where something of `sample` begins.
    fn first(&self, sample: usize, end: impl Fn(&Ends) -> u32) -> u32 {
        sample
            .checked_sub(1)
            .map_or(0, |last| end(&self.ends[last]))
    }

    /// Pairs of `sample`.
    pub fn pairs(&self, sample: usize) -> u32 {
        self.ends[sample].pairs - self.first(sample, |ends| ends.pairs)
    }

    /// webdataset's key of `sample`.
    pub fn key(&self, sample: usize) -> &str {
        let begin = self.first(sample, |ends| ends.key) as usize;
        &self.keys[begin..self.ends[sample].key as usize]
    }

    /// Which of the manifest's sources `sample` comes from.
    pub fn source(&self, sample: usize) -> u32 {
        self.ends[sample].source
    }

    /// Images of `sample`.
    pub fn images(&self, sample: usize) -> usize {
        let begin = self.first(sample, |ends| ends.places);
        (self.ends[sample].places - begin) as usize - 1
    }

    /// Image `image` of `sample`.
    pub fn image(&self, sample: usize, image: usize) -> Member {
        assert!(image < self.images(sample), "the sample has no such image");
        self.member(sample, image)
    }

    /// The member that holds the pairs of `sample`.
    pub fn text(&self, sample: usize) -> Member {
        self.member(sample, self.images(sample))
    }

    fn member(&self, sample: usize, nth: usize) -> Member {
        let begin = self.first(sample, |ends| ends.places) as usize;
        let place = &self.places[begin + nth];
        let suffix = &self.suffixes[place.suffix as usize];
        let key = if suffix.behind_key {
            self.key(sample)
        } else {
            ""
        };
        Member {
            name: format!("{key}{}", suffix.text),
            offset: place.offset,
            bytes: place.bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use shard_tools::manifest::SCHEMA_VERSION;

    fn sample(number: usize, pairs: u32, images: usize, plain: bool) -> SampleEntry {
        let key = format!("coco/{number:04}");
        let member = |name: String, nth: usize| Member {
            name,
            offset: (number * 4096 + nth * 1024) as u64,
            bytes: (number % 700 + nth) as u64,
        };
        let name = |nth: usize| match (plain, images) {
            (false, _) => format!("./{key}-{nth}.JPG"),
            (true, 1) => format!("{key}.jpg"),
            (true, _) => format!("{key}.{nth}.jpg"),
        };
        SampleEntry {
            images: (0..images).map(|i| member(name(i), i)).collect(),
            text: member(format!("{key}.txt"), images),
            pairs,
            source: number as u32 % 3,
            key,
        }
    }

    proptest! {
        #[test]
        fn it_says_what_the_index_says(
            samples in prop::collection::vec((0u32..6, 1usize..3, any::<bool>()), 1..60),
        ) {
            let samples: Vec<SampleEntry> = samples
                .into_iter()
                .enumerate()
                .map(|(i, (pairs, images, plain))| sample(i, pairs, images, plain))
                .collect();
            let index = ShardIndex {
                schema_version: SCHEMA_VERSION,
                file: "a.tar".into(),
                samples,
            };
            let held = Index::of(&index).expect("fits");
            prop_assert_eq!(held.samples(), index.samples.len());
            let mut pair = 0;
            for (i, sample) in index.samples.iter().enumerate() {
                prop_assert_eq!(held.key(i), &sample.key);
                prop_assert_eq!(held.pairs(i), sample.pairs);
                prop_assert_eq!(held.source(i), sample.source);
                prop_assert_eq!(held.images(i), sample.images.len());
                for (nth, image) in sample.images.iter().enumerate() {
                    prop_assert_eq!(&held.image(i, nth), image);
                }
                prop_assert_eq!(&held.text(i), &sample.text);
                for nth in 0..sample.pairs {
                    prop_assert_eq!(held.sample_of(pair), (i, nth as usize));
                    pair += 1;
                }
            }
        }
    }

    #[test]
    fn a_sample_takes_a_few_dozen_bytes() {
        let samples = (0..1000).map(|i| sample(i, 2, 1, true)).collect();
        let index = ShardIndex {
            schema_version: SCHEMA_VERSION,
            file: "a.tar".into(),
            samples,
        };
        let bytes = Index::of(&index).expect("fits").bytes();
        assert!(bytes < 80 * 1000, "{bytes} bytes");
    }
}
