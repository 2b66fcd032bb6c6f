//! A world apart: the whole program runs again in namespaces of its own for network, mounts,
//! processes and, without root, users.
//!
//! So addresses need not be free, tables and mounts are nobody else's, and everything ends with the
//! program, also after a panic or a kill: the kernel takes it all back with the last process.

use std::os::unix::process::CommandExt as _;
use std::process::Command;

const INSIDE: &str = "BELFRY_CHAOS_INSIDE";

/// Network, mounts and processes of its own; whoever is not root becomes it inside.
const APART: [&str; 6] = [
    "--net",
    "--mount",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
];
const AS_ROOT: [&str; 2] = ["--user", "--map-root-user"];

/// What must work inside.
const PROBE: &str = "mount -t tmpfs tmpfs /run && mkdir /run/netns && ip link set lo up \
    && ip link add probe type bridge && ip netns add probe \
    && nsenter --net=/run/netns/probe ip link set lo up";

/// Whether this process is the one inside.
pub fn inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// Becomes the one inside; comes back only with the reason why that cannot be.
pub fn enter() -> String {
    let mut why = String::new();
    for user in [&[][..], &AS_ROOT] {
        let probe = Command::new("unshare")
            .args(user)
            .args(APART)
            .args(["sh", "-c", PROBE])
            .output();
        match probe {
            Ok(output) if output.status.success() => {
                let program = std::env::current_exe().expect("is running");
                let mut command = Command::new("unshare");
                command.args(user).args(APART).arg(program);
                command.args(std::env::args_os().skip(1)).env(INSIDE, "1");
                return command.exec().to_string();
            }
            Ok(output) => {
                let said = String::from_utf8_lossy(&output.stderr);
                why = said.lines().last().unwrap_or("no reason given").to_owned();
            }
            Err(error) => why = format!("unshare: {error}"),
        }
    }
    format!("network namespaces need root (or user namespaces), unshare and ip: {why}")
}

/// Runs a command that must succeed; gives what it printed.
pub fn must(command: &mut Command) -> String {
    let output = command.output();
    let output = output.unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {said}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A small runtime, for a thread of its own.
pub fn runtime() -> tokio::runtime::Runtime {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_all().build().expect("a runtime")
}

/// Ends the program, and with it everything inside, when somebody presses Ctrl-C.
pub fn end_on_interrupt() {
    let pressed = runtime().block_on(tokio::signal::ctrl_c());
    if pressed.is_ok() {
        std::process::exit(130);
    }
}
