//! The file that the VQA challenge's server on EvalAI takes: a JSON list of
//! `{"question_id": int, "answer": str}`, every question of the split once
//! (<https://visualqa.org/challenge.html>, "results format"). Written and checked here.

use std::collections::BTreeSet;

use anyhow::{Context as _, bail, ensure};
use belfry_worker::evaluate::Chosen;
use serde_json::{Value, json};

/// Stands for a class without an answer (model_spec 13).
const UNKNOWN: &str = "unknown";

/// The file's text, in the order of the questions' numbers.
///
/// # Errors
/// A question id that is no number, or comes twice.
pub fn text(chosen: &[Chosen], answers: &[String]) -> anyhow::Result<String> {
    let mut all = Vec::with_capacity(chosen.len());
    for one in chosen {
        let id: u64 = one.id.parse().with_context(|| {
            format!(
                "question id `{}` is no number: pack the questions with --format vqav2",
                one.id
            )
        })?;
        let answer = answers.get(one.class as usize);
        all.push((id, answer.map_or(UNKNOWN, String::as_str)));
    }
    all.sort_unstable();
    if let Some(twice) = all.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        bail!("question {} stands twice in the data", twice[0].0);
    }
    let all: Vec<Value> = all
        .into_iter()
        .map(|(id, answer)| json!({"question_id": id, "answer": answer}))
        .collect();
    Ok(serde_json::to_string(&all)?)
}

/// Checks a file's text as the server documents it; with `questions` that exactly those are answered.
/// Returns how many answers there are.
///
/// # Errors
/// What is wrong first, with its place.
pub fn check(text: &[u8], questions: Option<&BTreeSet<u64>>) -> anyhow::Result<usize> {
    let all: Value = serde_json::from_slice(text).context("is not JSON")?;
    let all = all.as_array().context("is not a list of answers")?;
    let mut seen = BTreeSet::new();
    for (place, one) in all.iter().enumerate() {
        let id = checked(one).with_context(|| format!("element {place}"))?;
        ensure!(
            seen.insert(id),
            "element {place}: question {id} is answered twice"
        );
        if questions.is_some_and(|questions| !questions.contains(&id)) {
            bail!("element {place}: question {id} is not one of the split");
        }
    }
    ensure!(!seen.is_empty(), "answers no question");
    if let Some(missing) = questions.and_then(|all| all.iter().find(|id| !seen.contains(id))) {
        bail!("question {missing} has no answer");
    }
    Ok(seen.len())
}

fn checked(one: &Value) -> anyhow::Result<u64> {
    let fields = one.as_object().context("is no object")?;
    if let Some(other) = fields
        .keys()
        .find(|k| *k != "question_id" && *k != "answer")
    {
        bail!("has a field `{other}`; there are question_id and answer only");
    }
    let id = fields.get("question_id").context("has no question_id")?;
    let id = id
        .as_u64()
        .with_context(|| format!("question_id {id} is no whole number"))?;
    let answer = fields.get("answer").context("has no answer")?;
    let answer = answer
        .as_str()
        .with_context(|| format!("answer {answer} is no text"))?;
    ensure!(!answer.is_empty(), "the answer is empty");
    Ok(id)
}

/// Ids of a published questions file: `{"questions": [{"question_id": int, …}, …]}`.
///
/// # Errors
/// What is not as published.
pub fn questions(text: &[u8]) -> anyhow::Result<BTreeSet<u64>> {
    let file: Value = serde_json::from_slice(text).context("is not JSON")?;
    let all = file["questions"]
        .as_array()
        .context("has no list `questions`")?;
    let id = |one: &Value| one["question_id"].as_u64();
    all.iter()
        .map(|one| id(one).context("has a question without a question_id"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(id: &str, class: u32) -> Chosen {
        Chosen {
            id: id.into(),
            class,
        }
    }

    #[test]
    fn what_is_written_is_what_the_server_takes() {
        let answers = ["yes".to_owned(), "2".to_owned()];
        let all = [chosen("262148002", 1), chosen("7", 0), chosen("9", 5)];
        let text = text(&all, &answers).expect("is written");
        let expected = concat!(
            r#"[{"question_id":7,"answer":"yes"},{"question_id":9,"answer":"unknown"},"#,
            r#"{"question_id":262148002,"answer":"2"}]"#
        );
        assert_eq!(text, expected);
        let questions = BTreeSet::from([7, 9, 262148002]);
        assert_eq!(
            check(text.as_bytes(), Some(&questions)).expect("is right"),
            3
        );
        let told = super::text(&[chosen("x", 0)], &answers).expect_err("no number");
        assert!(told.to_string().contains('x'));
        assert!(super::text(&[chosen("7", 0), chosen("7", 1)], &answers).is_err());
    }

    #[test]
    fn every_lie_is_named() {
        let questions = BTreeSet::from([1, 2]);
        for (file, told) in [
            ("{", "not JSON"),
            ("{}", "not a list"),
            ("[]", "no question"),
            (r#"[{"question_id":"1","answer":"a"}]"#, "no whole number"),
            (r#"[{"question_id":1.5,"answer":"a"}]"#, "no whole number"),
            (r#"[{"question_id":1,"answer":3}]"#, "no text"),
            (r#"[{"question_id":1,"answer":""}]"#, "empty"),
            (r#"[{"question_id":1}]"#, "no answer"),
            (r#"[{"answer":"a"}]"#, "no question_id"),
            (r#"[{"question_id":1,"answer":"a","score":1}]"#, "score"),
            (
                r#"[{"question_id":1,"answer":"a"},{"question_id":1,"answer":"b"}]"#,
                "twice",
            ),
            (r#"[{"question_id":1,"answer":"a"}]"#, "2 has no answer"),
            (r#"[{"question_id":3,"answer":"a"}]"#, "3 is not one"),
            ("[7]", "no object"),
        ] {
            let error = check(file.as_bytes(), Some(&questions)).expect_err("is wrong");
            let said = format!("{error:#}");
            assert!(said.contains(told), "`{told}` is not in `{said}`");
        }
    }

    #[test]
    fn published_questions_are_read() {
        let file = br#"{"info":{},"questions":[{"question_id":5,"image_id":1,"question":"?"}]}"#;
        assert_eq!(
            super::questions(file).expect("is as published"),
            BTreeSet::from([5])
        );
        assert!(super::questions(b"{}").is_err());
    }
}
