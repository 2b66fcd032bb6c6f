//! Checkpoints of the real binary: a store that refuses, deaths between parts and manifest, every
//! kind of damage, retention, the scrubber and the commands that look at all this. Faults are placed
//! by what stands on the disk, never by sleeping.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::time::{Duration, Instant, SystemTime};

use crate::system::{Run, alone, outcome, undisturbed};

/// For a machine that is busy with something else.
const PATIENCE: Duration = Duration::from_secs(240);
/// Two checkpoints before the last one, all kept.
const ALL: [&str; 2] = ["--set", "checkpoint.keep_last=0"];

fn belfry(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_belfry"));
    command.current_dir(env!("CARGO_MANIFEST_DIR"));
    command.arg("checkpoint").args(arguments);
    command.output().expect("the binary starts")
}

/// What `belfry checkpoint` prints, with this exit code.
fn printed(arguments: &[&str], code: i32) -> String {
    let output = belfry(arguments);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let all = text(&output.stdout) + &text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {all}");
    all
}

fn folder(run: &Run, step: u64) -> PathBuf {
    run.local.join(format!("checkpoints/step-{step:09}"))
}

fn manifest(run: &Run, step: u64) -> PathBuf {
    folder(run, step).join("manifest.json")
}

/// A part of the checkpoint.
fn part(run: &Run, step: u64) -> PathBuf {
    let files = fs::read_dir(folder(run, step)).expect("a folder").flatten();
    let mut parts: Vec<PathBuf> = files.map(|f| f.path()).collect();
    parts.retain(|path| path.extension().is_some_and(|e| e == "safetensors"));
    parts.sort();
    parts.swap_remove(0)
}

fn await_that(child: &mut Child, what: &str, there: impl Fn() -> bool) {
    let begun = Instant::now();
    while !there() {
        let alive = child.try_wait().expect("is ours").is_none();
        assert!(alive || there(), "the run ended before {what}");
        assert!(begun.elapsed() < PATIENCE, "no {what} in time");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Ends everything at once.
fn kill_all(run: &Run, child: &mut Child, workers: u32) {
    let roles = (0..workers).map(|n| format!("worker-{n}"));
    let roles: Vec<String> = roles.chain(["coordinator".to_owned()]).collect();
    let pids: Vec<u32> = roles.iter().map(|role| run.pid(role)).collect();
    child.kill().expect("the launcher is killed");
    child.wait().expect("it was ours");
    for pid in pids {
        // Some have seen their launcher's end already.
        let _ = Command::new("kill").args(["-9", &pid.to_string()]).status();
        await_end(pid);
    }
}

fn await_end(pid: u32) {
    let begun = Instant::now();
    while Path::new(&format!("/proc/{pid}")).exists() {
        assert!(begun.elapsed() < PATIENCE, "process {pid} does not end");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_store_that_refuses_a_manifest_delays_the_checkpoint_and_no_step() {
    let _alone = alone();
    let folder = tempfile::tempdir().expect("a folder");
    let run = Run::in_folder(folder.path());
    // A folder in the manifest's place: nothing can be put there.
    fs::create_dir_all(manifest(&run, 4)).expect("is made");
    let mut child = run.start(2, &ALL);
    run.await_steps(&mut child, 7);
    assert!(manifest(&run, 4).is_dir(), "the fault is there");
    fs::remove_dir(manifest(&run, 4)).expect("the store is back");
    let outcome = outcome(child.wait_with_output().expect("ends"));
    assert_eq!(outcome.hashes(), *undisturbed());
    assert!(
        outcome
            .said
            .contains("the checkpoint of step 4 cannot be written yet"),
        "{}",
        outcome.said
    );
    assert!(
        outcome.said.contains("checkpoint of step 4 is durable"),
        "{}",
        outcome.said
    );
    assert!(outcome.said.contains("training waited"), "{}", outcome.said);
    printed(&["verify", &run.root, "--all"], 0);
}

#[test]
fn a_kill_between_parts_and_manifest_leaves_the_checkpoint_before_it() {
    let _alone = alone();
    let folder_of_run = tempfile::tempdir().expect("a folder");
    let run = Run::in_folder(folder_of_run.path());
    fs::create_dir_all(manifest(&run, 8)).expect("is made");
    let mut child = run.start(2, &ALL);
    // The next checkpoint begins only once this one's parts are all stored.
    run.await_steps(&mut child, 9);
    let parts = || fs::read_dir(folder(&run, 8)).map_or(0, |files| files.flatten().count());
    await_that(&mut child, "parts of step 8", || parts() >= 5);
    kill_all(&run, &mut child, 2);
    fs::remove_dir(manifest(&run, 8)).expect("the store is back");
    assert!(manifest(&run, 4).exists() && !manifest(&run, 8).exists());
    let listed = printed(&["ls", &run.root], 0);
    assert!(listed.contains("no manifest: not a checkpoint"), "{listed}");
    let resumed = run.finish(3, &[&ALL[..], &["--resume"]].concat());
    assert_eq!(resumed.hashes(), *undisturbed());
    assert!(
        resumed.said.contains("loading the checkpoint of step 4"),
        "{}",
        resumed.said
    );
    printed(&["verify", &run.root, "--all"], 0);
}

/// Copies a folder of files and folders.
fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("is made");
    for entry in fs::read_dir(from).expect("is read").flatten() {
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).expect("is copied");
        }
    }
}

#[test]
fn whatever_is_damaged_the_run_goes_on_from_the_newest_that_is_right() {
    let _alone = alone();
    let folder_of_run = tempfile::tempdir().expect("a folder");
    let run = Run::in_folder(folder_of_run.path());
    let mut child = run.start(2, &ALL);
    await_that(&mut child, "manifest of step 8", || {
        manifest(&run, 8).exists()
    });
    kill_all(&run, &mut child, 2);
    let before = folder_of_run.path().join("before");
    copy(&run.local, &before);
    let damages: [(&str, &dyn Fn()); 6] = [
        (".safetensors: part 0 has", &|| {
            let mut bytes = fs::read(first_part(&run)).expect("is read");
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            fs::write(first_part(&run), bytes).expect("is written");
        }),
        (".safetensors: part 0 has", &|| {
            let bytes = fs::read(first_part(&run)).expect("is read");
            fs::write(first_part(&run), &bytes[..bytes.len() - 1]).expect("is written");
        }),
        (".safetensors: is missing", &|| {
            fs::remove_file(first_part(&run)).expect("is removed");
        }),
        ("manifest.json: is not a manifest", &|| {
            let bytes = fs::read(manifest(&run, 8)).expect("is read");
            fs::write(manifest(&run, 8), &bytes[..bytes.len() / 2]).expect("is written");
        }),
        ("manifest.json: is not a manifest", &|| {
            fs::write(manifest(&run, 8), "no JSON").expect("is written");
        }),
        ("loading the checkpoint of step 4", &|| {
            fs::remove_dir_all(folder(&run, 8)).expect("is removed");
            fs::create_dir(folder(&run, 8)).expect("is made");
        }),
    ];
    for (named, damage) in damages {
        fs::remove_dir_all(&run.local).expect("is removed");
        copy(&before, &run.local);
        damage();
        let resumed = run.finish(2, &[&ALL[..], &["--resume"]].concat());
        assert_eq!(resumed.hashes(), *undisturbed(), "{named}");
        assert!(resumed.said.contains(named), "{named}: {}", resumed.said);
        if !named.starts_with("loading") {
            let loud = "falling back to the checkpoint before it";
            assert!(resumed.said.contains(loud), "{named}: {}", resumed.said);
        }
        // On its way it came by the damaged one again, and wrote it again.
        printed(&["verify", &run.root, "--all"], 0);
    }
}

/// The file of part 0 of step 8.
fn first_part(run: &Run) -> PathBuf {
    let text = fs::read(manifest(run, 8)).expect("is read");
    let manifest: serde_json::Value = serde_json::from_slice(&text).expect("is JSON");
    let file = manifest["parts"][0]["file"]
        .as_str()
        .expect("a name")
        .to_owned();
    folder(run, 8).join(file)
}

#[test]
fn what_is_not_kept_is_deleted_while_the_run_goes_on() {
    let _alone = alone();
    let folder_of_run = tempfile::tempdir().expect("a folder");
    let run = Run::in_folder(folder_of_run.path());
    let settings = [
        "--set",
        "checkpoint.every_steps=2",
        "--set",
        "checkpoint.keep_last=1",
        "--set",
        "checkpoint.keep_every_steps=6",
    ];
    let outcome = run.finish(2, &settings);
    assert_eq!(
        outcome.hashes(),
        *undisturbed(),
        "when they are written changes no bit"
    );
    let names = fs::read_dir(run.local.join("checkpoints")).expect("a folder");
    let mut names: Vec<_> = names.flatten().map(|f| f.file_name()).collect();
    names.sort();
    assert_eq!(names, ["step-000000006", "step-000000012"]);
    assert!(
        outcome
            .said
            .contains("no longer kept are deleted: of step 2"),
        "{}",
        outcome.said
    );
    printed(&["verify", &run.root, "--all"], 0);
}

#[test]
fn commands_list_verify_and_prune_what_stands() {
    let _alone = alone();
    let folder_of_run = tempfile::tempdir().expect("a folder");
    let run = Run::in_folder(folder_of_run.path());
    run.finish(1, &ALL).hashes();
    let listed = printed(&["ls", &run.root, "--json"], 0);
    let listed: serde_json::Value = serde_json::from_str(&listed).expect("is JSON");
    let steps: Vec<u64> = listed
        .as_array()
        .expect("a list")
        .iter()
        .map(|line| line["step"].as_u64().expect("a step"))
        .collect();
    assert_eq!(steps, [4, 8, 12]);
    assert!(
        listed[2]["evaluation"]["itm_accuracy"].is_number(),
        "{listed}"
    );
    assert!(listed[0]["cost"]["stall_seconds"].is_number(), "{listed}");
    assert_eq!(listed[0]["state"], "not verified");
    assert!(printed(&["verify", &run.root], 0).contains("step 12: "));

    let path = part(&run, 8);
    let mut bytes = fs::read(&path).expect("is read");
    bytes[100] ^= 1;
    fs::write(&path, bytes).expect("is written");
    let said = printed(&["verify", &run.root, "--all"], 1);
    let name = path
        .file_name()
        .expect("has one")
        .to_string_lossy()
        .into_owned();
    assert!(said.contains("CORRUPT") && said.contains(&name), "{said}");
    assert!(said.contains("wrong in bytes 0.."), "{said}");
    let listed = printed(&["ls", &run.root], 0);
    assert!(
        listed.contains("CORRUPT") && listed.contains("verified 20"),
        "{listed}"
    );
    assert!(printed(&["verify", &run.root, "--step", "5"], 2).contains("of steps: 4, 8, 12"));
    assert!(printed(&["ls", "/no/such/folder"], 2).contains("no such folder"));

    let prune = ["prune", &run.root, "--keep-last", "1", "--corrupt"];
    let dry = printed(&[&prune[..], &["--dry-run"]].concat(), 0);
    assert!(
        dry.contains("would be deleted: step 4") && dry.contains("step 8"),
        "{dry}"
    );
    assert!(folder(&run, 4).exists());
    // A run that is being led has a young entry and no result.
    fs::rename(run.local.join("result.json"), run.local.join("result.kept")).expect("is moved");
    let entries = fs::read_dir(run.local.join("journal"))
        .expect("a folder")
        .flatten();
    let newest = entries.map(|entry| entry.path()).max().expect("an entry");
    let aged = |at: SystemTime| {
        let file = fs::File::options()
            .write(true)
            .open(&newest)
            .expect("opens");
        file.set_modified(at).expect("is set");
    };
    aged(SystemTime::now());
    assert!(printed(&prune, 2).contains("is being led"));
    assert!(folder(&run, 4).exists());
    aged(SystemTime::now() - Duration::from_secs(3600));
    printed(&prune, 0);
    assert!(!folder(&run, 4).exists() && !folder(&run, 8).exists() && folder(&run, 12).exists());
}

#[test]
fn the_scrubber_finds_what_rots_while_the_run_goes_on() {
    let _alone = alone();
    let folder_of_run = tempfile::tempdir().expect("a folder");
    let run = Run::in_folder(folder_of_run.path());
    let settings = [
        "--set",
        "run.steps=100000",
        "--set",
        "checkpoint.scrub_hours=0.0003",
        "--set",
        "checkpoint.keep_last=0",
    ];
    let mut child = run.start(1, &settings);
    let mark = folder(&run, 4).join("verified.json");
    await_that(&mut child, "reading of step 4", || mark.exists());
    let path = part(&run, 4);
    let mut bytes = fs::read(&path).expect("is read");
    bytes[200] ^= 4;
    fs::write(&path, bytes).expect("is written");
    let mark = folder(&run, 4).join("corrupt.json");
    await_that(&mut child, "word of the flipped byte", || mark.exists());
    let text = fs::read_to_string(&mark).expect("is read");
    let name = path
        .file_name()
        .expect("has one")
        .to_string_lossy()
        .into_owned();
    assert!(
        text.contains(&name) && text.contains("wrong in bytes 0.."),
        "{text}"
    );
    kill_all(&run, &mut child, 1);
    assert!(printed(&["ls", &run.root], 0).contains("CORRUPT"));
}
