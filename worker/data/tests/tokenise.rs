//! Token ids are those of Hugging Face's `transformers`, with which the authors tokenise.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use belfry_data::Text;

fn house() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// A Python whose `transformers` still has the tokenizers that the authors used, or a loud word.
fn python() -> Option<String> {
    let program = std::env::var("BELFRY_PYTHON");
    let program = program.unwrap_or_else(|_| "python3".into());
    let asked = "import transformers as t; assert int(t.__version__.split('.')[0]) < 5";
    let found = Command::new(&program).args(["-c", asked]).output();
    if found.is_ok_and(|output| output.status.success()) {
        return Some(program);
    }
    let _ = writeln!(
        std::io::stderr(),
        "SKIPPED: `{program}` has no transformers below 5; `pip install 'transformers<5'` brings it, \
         BELFRY_PYTHON names the Python that has it"
    );
    None
}

/// Captions of photographs, and what people and crawlers write besides.
fn texts() -> Vec<String> {
    let folder = house().join("data/stamps");
    let entries = std::fs::read_dir(folder).expect("is there").flatten();
    let files = entries.map(|entry| entry.path());
    let files = files.filter(|file| file.extension().is_some_and(|e| e == "txt"));
    let captions = files.map(|file| std::fs::read_to_string(file).expect("is text"));
    let mut texts: Vec<String> = captions.map(|c| c.trim().to_owned()).collect();
    texts.sort();
    assert!(texts.len() > 200, "the photographs' captions");
    let real = texts.clone();
    // Long ones: truncation must cut at the same token.
    texts.extend(real.chunks(9).map(|some| some.join(" ")));
    texts.extend(real.iter().map(|text| text.to_uppercase()));
    texts.extend(
        [
            "",
            " ",
            "  two  spaces ",
            " leading",
            "trailing ",
            "a\tb\nc\r\nd",
            "\u{a0}nbsp\u{a0}x",
            "it's, they're, I'll, we've, he'd, I'm, don't",
            "rock 'n' roll ’90s “quoted” ‘single’",
            "1 12 123 1234 12345678901234567890 3.14 1,000,000 50% $9.99 #1 @home",
            "café naïve Ångström İstanbul ß ﬁ œuvre e\u{301} n\u{303} ẛ̣",
            "ÀÉÎÕÜ çğış łódź Đ ø",
            "日本語のテキスト 中文字符 한국어 混合mixed文字",
            "привет мир Ελληνικά שלום مرحبا हिन्दी ไทย",
            "😀 👩‍👩‍👧‍👦 🇩🇪 👍🏽 ❤️ ☃",
            "control \u{0}\u{1}\u{7f}\u{85}\u{200b}\u{200d}\u{feff}\u{fffd} x",
            "soft\u{ad}hyphen \u{2028}line\u{2029}para \u{3000}wide",
            "a/b\\c|d~e^f`g{h}[i]<j>",
            "!!! ??? ... --- *** ___ ((())) ,,,",
            "http://example.com/a?b=c&d=e#f user@host.org",
            "CamelCase snake_case kebab-case ALLCAPS mIxEd",
            "<person> in <location>, <mask> [MASK] x",
            "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ｆｕｌｌｗｉｄｔｈ Ⅷ ½ ² ㎏",
            "\u{1f468}\u{200d}\u{1f680}\u{e0067}",
            "ａ１！ ‐‑‒–—―",
        ]
        .map(String::from),
    );
    texts.push("x".repeat(99));
    texts.push("y".repeat(100));
    texts.push("z".repeat(101));
    texts.push("word ".repeat(3000));
    texts.push("漢".repeat(500));
    texts
}

fn theirs(python: &str, kind: &str, tokenizer: &str, text_len: usize) -> Vec<Vec<i32>> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python/tokenise.py");
    let mut child = Command::new(python)
        .arg(script)
        .args([kind, tokenizer, &text_len.to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("Python starts");
    let mut stdin = child.stdin.take().expect("is piped");
    let lines = texts().into_iter();
    let lines = lines.map(|text| serde_json::to_string(&text).expect("plain") + "\n");
    let lines: String = lines.collect();
    let writer = std::thread::spawn(move || stdin.write_all(lines.as_bytes()));
    let output = child.wait_with_output().expect("ends");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    writer.join().expect("does not panic").expect("is read");
    let lines = String::from_utf8(output.stdout).expect("is text");
    let ids = lines
        .lines()
        .map(|line| serde_json::from_str(line).expect("is a list"));
    ids.collect()
}

#[test]
fn ids_are_those_of_transformers() {
    let Some(python) = python() else { return };
    for (kind, name, vocab) in [
        ("roberta", "roberta-base", 50265),
        ("bert", "bert-base-uncased", 30522),
    ] {
        let file = house().join(format!("data/tokenizer/{name}.tokenizer.json"));
        let file = file.display().to_string();
        for text_len in [8, 40, 50] {
            let ours = Text::open(&file, text_len, vocab).expect("loads");
            let theirs = theirs(&python, kind, &file, text_len);
            let texts = texts();
            assert_eq!(texts.len(), theirs.len());
            for (text, ids) in texts.iter().zip(theirs) {
                let found = ours.ids(text).expect("encodes");
                assert_eq!(found, ids, "{kind}, {text_len} tokens: {text:?}");
            }
        }
    }
}
