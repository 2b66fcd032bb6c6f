//! Run files laid over run files: what wins, and what is refused with which name.

use std::path::{Path, PathBuf};

use belfry_configs::{ConfigError, ValidConfig, load};

/// A folder with a copy of tiny.toml, and files over it.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("tiny.toml");
        std::fs::copy(tiny, folder.path().join("tiny.toml")).expect("is copied");
        Folder(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) -> &Self {
        let file = self.path(name);
        std::fs::create_dir_all(file.parent().expect("is below")).expect("is made");
        std::fs::write(file, text).expect("is written");
        self
    }

    fn load(&self, name: &str, settings: &[&str]) -> Result<ValidConfig, ConfigError> {
        let settings: Vec<String> = settings.iter().map(|s| (*s).to_owned()).collect();
        load(&self.path(name), &settings)
    }

    fn refused(&self, name: &str, settings: &[&str]) -> String {
        let refused = self.load(name, settings);
        refused.expect_err("must be refused").to_string()
    }
}

#[test]
fn the_file_above_wins_and_the_result_has_no_base() {
    let folder = Folder::new();
    folder
        .write("middle.toml", "base = \"tiny.toml\"\n[run]\nsteps = 5\nseed = 7\n")
        .write(
            "above/top.toml",
            "base = \"../middle.toml\"\n[run]\nname = \"top\"\nseed = 9\n[model.text]\nlayers = 3\n",
        );
    let config = folder.load("above/top.toml", &[]).expect("is valid");
    let run = &config.run;
    assert_eq!((run.name.as_str(), run.steps, run.seed), ("top", 5, 9));
    let text = &config.model.text;
    assert_eq!((text.layers, text.managed, text.hidden), (3, 2, 16));
    assert!(!config.to_toml().contains("base ="), "{}", config.to_toml());

    let flat = folder.load(
        "tiny.toml",
        &[
            "run.steps=5",
            "run.seed=9",
            "run.name=top",
            "model.text.layers=3",
        ],
    );
    assert_eq!(flat.expect("is valid").sha256(), config.sha256());
}

#[test]
fn an_overlay_stands_where_it_is_set() {
    let folder = Folder::new();
    folder.write("over.toml", "[run]\nsteps = 6\n[batch]\nlanes = 4\n");
    let over = format!("@{}", folder.path("over.toml").display());
    let steps = |settings: &[&str]| {
        let config = folder.load("tiny.toml", settings).expect("is valid");
        (config.run.steps, config.batch.lanes)
    };
    assert_eq!(steps(&[&over]), (6, 4));
    assert_eq!(steps(&["run.steps=3", &over]), (6, 4), "the last wins");
    assert_eq!(steps(&[&over, "run.steps=3"]), (3, 4));
    // An overlay may have files below it, too.
    folder.write("more.toml", "base = \"over.toml\"\n[run]\nsteps = 8\n");
    let more = format!("@{}", folder.path("more.toml").display());
    assert_eq!(steps(&[&more]), (8, 4));
    let told = folder.refused("tiny.toml", &["@no/such/file.toml"]);
    assert!(told.contains("no/such/file.toml"), "{told}");
}

#[test]
fn chains_end() {
    let folder = Folder::new();
    folder
        .write("a.toml", "base = \"b.toml\"\n")
        .write("b.toml", "base = \"./a.toml\"\n")
        .write("self.toml", "base = \"self.toml\"\n")
        .write("number.toml", "base = 3\n")
        .write("away.toml", "base = \"nowhere.toml\"\n");
    let told = folder.refused("a.toml", &[]);
    assert!(
        told.contains("b.toml: base: `./a.toml` lies above"),
        "{told}"
    );
    let told = folder.refused("self.toml", &[]);
    assert!(told.contains("lies above"), "{told}");
    let told = folder.refused("number.toml", &[]);
    assert!(told.contains("number.toml: base: must be"), "{told}");
    let told = folder.refused("away.toml", &[]);
    assert!(told.contains("away.toml: base: cannot read"), "{told}");
    assert!(told.contains("nowhere.toml"), "{told}");

    let mut below = "tiny.toml".to_owned();
    for number in 0..8 {
        let name = format!("{number}.toml");
        folder.write(&name, &format!("base = \"{below}\"\n"));
        below = name;
    }
    folder.load("6.toml", &[]).expect("eight files are allowed");
    let told = folder.refused("7.toml", &[]);
    assert!(
        told.contains("0.toml: base: `tiny.toml` would be file 9"),
        "{told}"
    );
}

#[test]
fn what_is_wrong_is_told_with_the_file_it_stands_in() {
    let folder = Folder::new();
    folder
        .write("low.toml", "base = \"tiny.toml\"\n[batch]\nlaness = 4\n")
        .write("high.toml", "base = \"low.toml\"\n[run]\nsteps = 5\n")
        .write(
            "type.toml",
            "base = \"tiny.toml\"\n[model.text]\nlayers = \"two\"\n",
        )
        .write("typo.toml", "base = \"tiny.toml\"\n[run\n")
        .write("bare.toml", "[run]\nname = \"bare\"\n")
        .write("head.toml", "base = \"bare.toml\"\n");
    let told = folder.refused("high.toml", &[]);
    assert!(
        told.contains("low.toml: ") && told.contains("`laness`"),
        "{told}"
    );
    assert!(!told.contains("high.toml"), "{told}");
    let told = folder.refused("type.toml", &["run.steps=3"]);
    assert!(
        told.contains("type.toml: ") && told.contains("layers"),
        "{told}"
    );
    let told = folder.refused("typo.toml", &[]);
    assert!(
        told.contains("typo.toml: ") && told.contains("line 2"),
        "{told}"
    );
    let told = folder.refused("tiny.toml", &["run.steps=3", "batch.laness=4"]);
    assert!(told.starts_with("--set batch.laness=4: "), "{told}");
    let told = folder.refused("head.toml", &[]);
    assert!(told.contains("head.toml: missing field"), "{told}");
    // A number that cannot be is told by its key, wherever it stands.
    folder.write("lanes.toml", "base = \"tiny.toml\"\n[batch]\nlanes = 3\n");
    let told = folder.refused("lanes.toml", &[]);
    assert!(told.starts_with("batch.lanes: "), "{told}");
}
