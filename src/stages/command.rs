//! The command lines of a plan's processes, as pure functions of what they are for.

use std::ffi::OsString;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use belfry_configs::plan::Work;
use belfry_proto::v1::{ChildRole, Order};

use super::place::stage_root;

/// What an agent knows of its host.
pub struct Host<'a> {
    /// The plan's root.
    pub root: &'a str,
    /// The agent's folder.
    pub local: &'a Path,
    /// Where processes of other hosts reach this one.
    pub bind: IpAddr,
}

impl Host<'_> {
    /// The folder of a stage on this host.
    pub fn folder(&self, stage: &str) -> PathBuf {
        self.local.join("stages").join(stage)
    }

    /// Its logs.
    pub fn logs(&self, stage: &str) -> PathBuf {
        self.folder(stage).join("logs")
    }

    /// Where its coordinator says where it is, when it is here.
    pub fn address_file(&self, stage: &str) -> PathBuf {
        self.folder(stage).join("coordinator.address")
    }

    /// Its resolved run file.
    pub fn config(&self, stage: &str) -> PathBuf {
        self.folder(stage).join("resolved.toml")
    }
}

/// What a process is called, in logs and among process ids.
pub fn name(order: &Order) -> String {
    match order.role() {
        ChildRole::Coordinator => "coordinator".into(),
        ChildRole::Worker => format!("worker-{}", order.worker_id),
        ChildRole::Evaluation => "evaluation".into(),
    }
}

/// What the process of an order is started with.
pub fn of(host: &Host, order: &Order) -> Vec<OsString> {
    let stage = &order.stage;
    let text = |text: &str| OsString::from(text);
    let mut arguments: Vec<OsString> = match order.role() {
        ChildRole::Evaluation => {
            let mut own: Vec<OsString> = order.arguments.iter().map(OsString::from).collect();
            own.extend([text("--to"), host.folder(stage).into()]);
            return own;
        }
        ChildRole::Coordinator => vec![
            text("coordinator"),
            // Of one name wherever it runs: who follows on another host knows that it is gone.
            text("--name"),
            text("coordinator"),
            text("--workers"),
            order.workers.to_string().into(),
            text("--listen"),
            format!("{}:0", bracketed(host.bind)).into(),
            text("--address-file"),
            host.address_file(stage).into(),
        ],
        ChildRole::Worker => vec![
            text("worker"),
            text("--id"),
            order.worker_id.to_string().into(),
            text("--bind"),
            host.bind.to_string().into(),
            text("--cache"),
            host.local.join("cache").into(),
        ],
    };
    let log = host.logs(stage).join(format!("{}.jsonl", name(order)));
    arguments.extend([
        text("--root"),
        stage_root(host.root, stage).into(),
        text("--log"),
        log.into(),
        text("--follow-stdin"),
        host.config(stage).into(),
    ]);
    arguments
}

fn bracketed(address: IpAddr) -> String {
    match address {
        IpAddr::V4(address) => address.to_string(),
        IpAddr::V6(address) => format!("[{address}]"),
    }
}

/// The command line of an evaluation, but for the folder of its files, which its host chooses;
/// empty for what trains.
pub fn evaluation(root: &str, work: &Work) -> Vec<String> {
    let Work::Eval {
        of,
        data,
        best,
        set,
    } = work
    else {
        return Vec::new();
    };
    let mut arguments = vec!["eval".to_owned(), "--run".into(), stage_root(root, of)];
    let pairs = [("--best", best), ("--data", data)];
    for (name, value) in pairs {
        if let Some(value) = value {
            arguments.extend([name.to_owned(), value.clone()]);
        }
    }
    for setting in set {
        arguments.extend(["--set".to_owned(), setting.clone()]);
    }
    arguments.push("--json".into());
    arguments
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(order: Order) -> String {
        let host = Host {
            root: "s3://b/plan",
            local: Path::new("/here"),
            bind: "10.0.0.1".parse().expect("an address"),
        };
        let words = of(&host, &order);
        let words: Vec<_> = words.iter().map(|w| w.to_string_lossy()).collect();
        words.join(" ")
    }

    fn order(role: ChildRole) -> Order {
        Order {
            stage: "pre".into(),
            role: role.into(),
            worker_id: 65,
            workers: 3,
            ..Default::default()
        }
    }

    #[test]
    fn a_stages_processes_share_its_root_and_its_run_file() {
        assert_eq!(
            told(order(ChildRole::Coordinator)),
            "coordinator --name coordinator --workers 3 --listen 10.0.0.1:0 --address-file \
             /here/stages/pre/coordinator.address --root s3://b/plan/stages/pre --log \
             /here/stages/pre/logs/coordinator.jsonl --follow-stdin /here/stages/pre/resolved.toml"
        );
        assert_eq!(
            told(order(ChildRole::Worker)),
            "worker --id 65 --bind 10.0.0.1 --cache /here/cache --root s3://b/plan/stages/pre --log \
             /here/stages/pre/logs/worker-65.jsonl --follow-stdin /here/stages/pre/resolved.toml"
        );
    }

    #[test]
    fn an_evaluation_names_the_run_that_it_looks_at() {
        let work = Work::Eval {
            of: "vqav2".into(),
            data: Some("s3://b/test".into()),
            best: Some("vqa_score".into()),
            set: vec!["eval.top_k=64".into()],
        };
        let arguments = evaluation("s3://b/plan", &work);
        assert_eq!(
            arguments.join(" "),
            "eval --run s3://b/plan/stages/vqav2 --best vqa_score --data s3://b/test --set \
             eval.top_k=64 --json"
        );
        let text = told(Order {
            arguments,
            ..order(ChildRole::Evaluation)
        });
        assert!(text.ends_with("--json --to /here/stages/pre"), "{text}");
    }
}
