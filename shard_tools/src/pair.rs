//! What one pair of a sample says: a caption, a question with its answers, a statement with a label.

use serde::{Deserialize, Serialize};

/// Longest text, in bytes.
const TEXT_BYTES_MAX: usize = 16 << 10;
/// Most pairs of one sample: Visual Genome's busiest image has a few hundred.
const PAIRS_MAX: usize = 1 << 16;
/// Most labels of one pair: ten annotators give ten answers.
const LABELS_MAX: usize = 64;
/// Extension of a member that holds pairs with labels.
pub const PAIRS_EXTENSION: &str = "pairs.json";
/// Extension of a member that holds captions, one a line.
pub const TEXT_EXTENSION: &str = "txt";

/// What the pairs of a dataset carry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Contents {
    /// A caption: COCO, Visual Genome, SBU, Conceptual Captions, Flickr30K.
    #[default]
    Captions,
    /// A question; labels are rows of the dataset's answer file, scores their soft scores. A test
    /// split's have none.
    Vqa,
    /// A hypothesis; one label: 0 contradiction, 1 neutral, 2 entailment.
    SnliVe,
    /// A statement about two images; one label: 0 false, 1 true.
    Nlvr2,
}

impl Contents {
    /// Images of one sample.
    pub fn images(self) -> usize {
        if self == Contents::Nlvr2 { 2 } else { 1 }
    }

    /// Classes, where they do not depend on the dataset.
    pub fn classes(self) -> Option<u32> {
        match self {
            Contents::Captions | Contents::Vqa => None,
            Contents::SnliVe => Some(3),
            Contents::Nlvr2 => Some(2),
        }
    }
}

/// One pair, as `key.pairs.json` lists them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pair {
    /// Caption, question, hypothesis or statement.
    pub text: String,
    /// The publisher's id of the pair, where it has one: a VQAv2 question id, an NLVR2 identifier.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Classes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub labels: Vec<u32>,
    /// A soft score for each label; none where there is one class for certain.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub scores: Vec<f32>,
}

impl Pair {
    /// A caption.
    pub fn caption(text: String) -> Self {
        Pair {
            text,
            ..Pair::default()
        }
    }

    fn check(&self) -> Result<(), String> {
        check_text(&self.text)?;
        if self.labels.len() > LABELS_MAX {
            return Err(format!("a pair has more than {LABELS_MAX} labels"));
        }
        if !self.scores.is_empty() && self.scores.len() != self.labels.len() {
            return Err(format!(
                "a pair has {} labels and {} scores",
                self.labels.len(),
                self.scores.len()
            ));
        }
        if self.scores.iter().any(|s| !(0.0..=1.0).contains(s)) {
            return Err("a score lies outside 0..=1".into());
        }
        Ok(())
    }
}

fn check_text(text: &str) -> Result<(), String> {
    if text.is_empty() {
        return Err("a text is empty".into());
    }
    if text.len() > TEXT_BYTES_MAX {
        return Err(format!("a text is longer than {TEXT_BYTES_MAX} bytes"));
    }
    Ok(())
}

/// Pairs of a text member, by its name: captions, one a line, or JSON.
///
/// # Errors
/// A reason: not UTF-8, not JSON, too long, none.
pub fn pairs(member: &str, bytes: &[u8]) -> Result<Vec<Pair>, String> {
    if !member.to_ascii_lowercase().ends_with(PAIRS_EXTENSION) {
        let captions = captions(bytes)?;
        return Ok(captions.into_iter().map(Pair::caption).collect());
    }
    let pairs: Vec<Pair> =
        serde_json::from_slice(bytes).map_err(|e| format!("not a list of pairs: {e}"))?;
    if pairs.is_empty() || pairs.len() > PAIRS_MAX {
        return Err(format!("{} pairs, not 1 to {PAIRS_MAX}", pairs.len()));
    }
    pairs.iter().try_for_each(Pair::check)?;
    Ok(pairs)
}

/// Captions of a caption file: one a line, trimmed, empty ones dropped, duplicates dropped
/// first-seen (model_spec 13).
///
/// # Errors
/// A reason: not UTF-8, too long, none.
pub fn captions(text: &[u8]) -> Result<Vec<String>, String> {
    let text = std::str::from_utf8(text).map_err(|e| format!("captions are not UTF-8: {e}"))?;
    distinct(text.lines().map(str::to_owned))
}

/// Captions trimmed, empty ones and duplicates dropped, in the order in which they were first seen;
/// an unordered set would depend on a process's hash seed.
///
/// # Errors
/// A reason: too long, none.
pub fn distinct(captions: impl IntoIterator<Item = String>) -> Result<Vec<String>, String> {
    let mut seen = std::collections::BTreeSet::new();
    let mut kept = Vec::new();
    for caption in captions {
        // A line break would make two captions of one.
        let caption = caption.split_whitespace().collect::<Vec<_>>().join(" ");
        if caption.is_empty() || seen.contains(&caption) {
            continue;
        }
        check_text(&caption)?;
        seen.insert(caption.clone());
        kept.push(caption);
    }
    if kept.is_empty() {
        return Err("no caption".into());
    }
    if kept.len() > PAIRS_MAX {
        return Err(format!("more than {PAIRS_MAX} captions"));
    }
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn captions_keep_their_first_order() {
        let found = captions(b"b\n a \n\nb\nc\r\n").expect("good");
        assert_eq!(found, ["b", "a", "c"]);
        assert!(captions(b" \n").expect_err("none").contains("no caption"));
    }

    #[test]
    fn pairs_come_back_as_written_and_lies_are_named() {
        let pair = Pair {
            text: "is it red?".into(),
            id: Some("7".into()),
            labels: vec![3, 1],
            scores: vec![1.0, 0.3],
        };
        let bytes = serde_json::to_vec(&[&pair]).expect("plain");
        assert_eq!(pairs("a.pairs.json", &bytes).expect("good"), [pair]);
        let wrong = |json: &str| pairs("a.pairs.json", json.as_bytes()).expect_err("wrong");
        assert!(wrong("[]").contains("0 pairs"));
        assert!(wrong(r#"[{"text":""}]"#).contains("empty"));
        assert!(wrong(r#"[{"text":"a","labels":[1],"scores":[1,2]}]"#).contains("2 scores"));
        assert!(wrong(r#"[{"text":"a","labels":[1],"scores":[7]}]"#).contains("outside"));
        assert!(wrong(r#"[{"text":"a","what":1}]"#).contains("what"));
    }
}
