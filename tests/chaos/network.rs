//! One bridge with a host per process on it, and the faults of networks: packets dropped or refused
//! by rule, links made slow, connections led elsewhere. It knows no Belfry.
//!
//! Every fault is a guard that heals when dropped, and counts what it did: a fault that met no
//! packet did not happen.

use std::io::Write as _;
use std::net::Ipv4Addr;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::apart::must;

/// Where the test itself is, and what all hosts reach.
pub const HUB: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);

/// All hosts with the last number of their addresses.
const HOSTS: [(&str, u8); 8] = [
    ("coordinator", 2),
    ("standby", 3),
    ("store", 4),
    ("worker-0", 10),
    ("worker-1", 11),
    ("worker-2", 12),
    ("worker-3", 13),
    ("worker-4", 14),
];

/// Address of `host`.
pub fn address(host: &str) -> Ipv4Addr {
    let found = HOSTS.iter().find(|(name, _)| *name == host);
    let (_, number) = found.unwrap_or_else(|| panic!("no host `{host}`"));
    Ipv4Addr::new(10, 77, 0, *number)
}

/// `program` on `host`: in its network, and in everybody's files and processes.
pub fn on(host: &str, program: &str) -> Command {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net=/run/netns/{host}")).arg(program);
    command
}

fn ip(arguments: &str) {
    must(Command::new("ip").args(arguments.split(' ')));
}

/// Brings up the bridge and all hosts.
pub fn open() {
    must(Command::new("mount").args(["-t", "tmpfs", "tmpfs", "/run"]));
    std::fs::create_dir("/run/netns").expect("is made");
    ip("link set lo up");
    ip("link add hub type bridge");
    ip(&format!("addr add {HUB}/24 dev hub"));
    ip("link set hub up");
    for (host, number) in HOSTS {
        let address = address(host);
        ip(&format!("netns add {host}"));
        ip(&format!(
            "link add port{number} type veth peer name eth0 netns {host}"
        ));
        ip(&format!("link set port{number} master hub up"));
        ip(&format!("-n {host} addr add {address}/24 dev eth0"));
        ip(&format!("-n {host} link set eth0 up"));
        ip(&format!("-n {host} link set lo up"));
    }
}

/// Whether packet rules can be made here; said loudly once where not.
pub fn filters() -> bool {
    static ABLE: std::sync::LazyLock<bool> = std::sync::LazyLock::new(|| {
        let probe = "add table bridge probe; add chain bridge probe forward { type filter hook \
             forward priority 0; }; delete table bridge probe";
        let made = Command::new("nft").arg(probe).output();
        let able = made.is_ok_and(|output| output.status.success());
        if !able {
            crate::skipped::skipped("no nft, or no bridge rules: faults on packets are not tested");
        }
        able
    });
    *ABLE
}

/// Packet rules. They heal when this is dropped.
pub struct Filter {
    /// The host in whose network they stand; on the bridge between all hosts otherwise.
    host: Option<String>,
    family: &'static str,
    table: String,
}

impl Filter {
    /// Rules for what passes between hosts, for instance `ip saddr 10.77.0.2 counter drop`.
    pub fn between(rules: &[String]) -> Self {
        Filter::make(
            None,
            "bridge",
            "type filter hook forward priority 0;",
            rules,
        )
    }

    /// Rules for what arrives at the hub.
    pub fn arriving(rules: &[String]) -> Self {
        Filter::make(None, "inet", "type filter hook input priority 0;", rules)
    }

    /// Leads connections that `host` makes elsewhere.
    pub fn leading(host: &str, rules: &[String]) -> Self {
        Filter::make(
            Some(host),
            "ip",
            "type nat hook output priority -100;",
            rules,
        )
    }

    /// Nothing passes between `host` and all others. Nobody is told.
    pub fn partition(host: &str) -> Self {
        let address = address(host);
        let rules = ["saddr", "daddr"].map(|side| format!("ip {side} {address} counter drop"));
        Filter::between(&rules)
    }

    /// Nothing passes between these two hosts.
    pub fn cut(one: &str, other: &str) -> Self {
        let (one, other) = (address(one), address(other));
        Filter::between(&[
            format!("ip saddr {one} ip daddr {other} counter drop"),
            format!("ip saddr {other} ip daddr {one} counter drop"),
        ])
    }

    fn make(host: Option<&str>, family: &'static str, hook: &str, rules: &[String]) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let table = format!("fault{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        let filter = Filter {
            host: host.map(str::to_owned),
            family,
            table,
        };
        let (family, table) = (filter.family, &filter.table);
        let mut script = format!("add table {family} {table}\nadd chain {family} {table} rules ");
        script += &format!("{{ {hook} }}\n");
        for rule in rules {
            script += &format!("add rule {family} {table} rules {rule}\n");
        }
        // All rules at once: a partition has no order.
        let mut child = filter
            .nft()
            .args(["-f", "-"])
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("nft starts");
        let mut input = child.stdin.take().expect("is piped");
        input.write_all(script.as_bytes()).expect("is read");
        drop(input);
        let output = child.wait_with_output().expect("ends");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{script}: {said}");
        filter
    }

    fn nft(&self) -> Command {
        match &self.host {
            Some(host) => on(host, "nft"),
            None => Command::new("nft"),
        }
    }

    /// Packets that the rules met.
    pub fn packets(&self) -> u64 {
        let listed = must(self.nft().args(["list", "table", self.family, &self.table]));
        let counts = listed.split("counter packets ").skip(1);
        let numbers = counts.map(|rest| rest.split(' ').next().and_then(|n| n.parse::<u64>().ok()));
        numbers.map(|n| n.expect("a number")).sum()
    }
}

impl Drop for Filter {
    fn drop(&mut self) {
        let healed = self
            .nft()
            .args(["delete", "table", self.family, &self.table])
            .output();
        if !std::thread::panicking() {
            assert!(
                healed.is_ok_and(|o| o.status.success()),
                "{} stays",
                self.table
            );
        }
    }
}

/// A host whose link carries so much and no more, both ways, until this is dropped.
pub struct Throttle {
    host: String,
    port: String,
}

impl Throttle {
    /// `megabits` per second.
    pub fn new(host: &str, megabits: u32) -> Self {
        let port = format!("port{}", address(host).octets()[3]);
        let shape = |command: &mut Command, device: &str| {
            let rate = format!("{megabits}mbit");
            command.args(["qdisc", "add", "dev", device, "root", "tbf", "rate", &rate]);
            must(command.args(["burst", "16kb", "latency", "200ms"]));
        };
        shape(&mut Command::new("tc"), &port);
        shape(&mut on(host, "tc"), "eth0");
        let host = host.to_owned();
        Throttle { host, port }
    }

    /// Packets that had to wait or were dropped.
    pub fn held_back(&self) -> u64 {
        let show = ["-s", "qdisc", "show", "dev"];
        let shown = must(Command::new("tc").args(show).arg(&self.port))
            + &must(on(&self.host, "tc").args(show).arg("eth0"));
        let counts = shown.split("overlimits ").skip(1);
        let numbers = counts.map(|rest| rest.split(' ').next().and_then(|n| n.parse::<u64>().ok()));
        numbers.map(|n| n.expect("a number")).sum()
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        let _ = Command::new("tc")
            .args(["qdisc", "del", "dev", &self.port, "root"])
            .output();
        let _ = on(&self.host, "tc")
            .args(["qdisc", "del", "dev", "eth0", "root"])
            .output();
    }
}
