//! A proxy that does to answers what networks and servers do: cuts, refuses, slows, shortens, lies,
//! stalls. One request a connection; it knows HTTP's first lines and nothing of S3.

use std::io::{self, BufReader, Read, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// What happens to one answer.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    None,
    /// The connection ends before any answer.
    Hang,
    /// The connection ends after so many bytes of the body, which was announced whole.
    Cut(u64),
    /// This status instead of the answer.
    Status(&'static str),
    /// So many bytes a second.
    Slow(u64),
    /// So many bytes fewer than asked for, and a header that says so.
    Short(u64),
    /// One bit of the byte at this place is another.
    Wrong(u64),
    /// Nothing more comes after so many bytes, and the connection stays.
    Stall(u64),
}

/// Which fault meets the `n`th request (from 0) for a path that faults are for.
pub type Faults = Arc<dyn Fn(u64) -> Fault + Send + Sync>;

/// A running proxy; it serves until the process ends.
pub struct FaultProxy {
    pub address: SocketAddr,
    /// Requests that met `faults`.
    pub requests: Arc<AtomicU64>,
}

impl FaultProxy {
    /// Passes requests on to `upstream`; those whose path `is_meant` meet `faults`.
    pub fn start(upstream: &str, is_meant: fn(&str) -> bool, faults: Faults) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("binds");
        let address = listener.local_addr().expect("is bound");
        let requests = Arc::new(AtomicU64::new(0));
        let (count, upstream) = (Arc::clone(&requests), upstream.to_owned());
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let (faults, count) = (Arc::clone(&faults), Arc::clone(&count));
                let upstream = upstream.clone();
                let fault = move |path: &str| match is_meant(path) {
                    true => faults(count.fetch_add(1, Ordering::SeqCst)),
                    false => Fault::None,
                };
                // A client that gives up ends its connection with an error: that is what is tested.
                std::thread::spawn(move || drop(pass(client, &upstream, fault)));
            }
        });
        FaultProxy { address, requests }
    }
}

/// Request or answer up to its body: the first line and the headers, without line ends.
fn head(reader: &mut impl io::BufRead) -> io::Result<Vec<String>> {
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        match line.trim_end() {
            "" => return Ok(lines),
            line => lines.push(line.to_owned()),
        }
    }
}

fn pass(client: TcpStream, upstream: &str, fault: impl Fn(&str) -> Fault) -> io::Result<()> {
    let request = head(&mut BufReader::new(client.try_clone()?))?;
    let path = request[0].split(' ').nth(1).unwrap_or("");
    let fault = fault(path);
    let mut client = client;
    match fault {
        Fault::Hang => return client.shutdown(Shutdown::Both),
        Fault::Status(status) => {
            let nothing = "Content-Length: 0\r\nConnection: close\r\n\r\n";
            return write!(client, "HTTP/1.1 {status}\r\n{nothing}");
        }
        _ => {}
    }
    let mut server = TcpStream::connect(upstream)?;
    let is_kept = |line: &&String| !line.to_ascii_lowercase().starts_with("connection:");
    let kept: Vec<&str> = request.iter().filter(is_kept).map(String::as_str).collect();
    write!(server, "{}\r\nConnection: close\r\n\r\n", kept.join("\r\n"))?;
    let mut server = BufReader::new(server);
    let answer = head(&mut server)?;
    let length = |line: &String| {
        let line = line.to_ascii_lowercase();
        line.strip_prefix("content-length:")?.trim().parse().ok()
    };
    let total: u64 = answer.iter().find_map(length).unwrap_or(0);
    let announced = match fault {
        Fault::Short(fewer) => total.saturating_sub(fewer),
        _ => total,
    };
    let is_kept = |line: &&String| is_kept(line) && length(line).is_none();
    let kept: Vec<&str> = answer.iter().filter(is_kept).map(String::as_str).collect();
    let ours = format!("Content-Length: {announced}\r\nConnection: close\r\n\r\n");
    write!(client, "{}\r\n{ours}", kept.join("\r\n"))?;
    if request[0].starts_with("HEAD ") {
        return Ok(());
    }
    body(&mut server.take(announced), &mut client, fault)?;
    client.shutdown(Shutdown::Both)
}

fn body(from: &mut impl Read, to: &mut TcpStream, fault: Fault) -> io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    let begun = Instant::now();
    let mut at = 0;
    loop {
        let read = from.read(&mut buffer)?;
        if read == 0 {
            return Ok(());
        }
        let mut piece = &mut buffer[..read];
        match fault {
            Fault::Cut(end) | Fault::Stall(end) if at + piece.len() as u64 >= end => {
                piece = &mut piece[..(end - at) as usize];
                to.write_all(piece)?;
                if matches!(fault, Fault::Stall(_)) {
                    // Until the client gives up.
                    while to.read(&mut [0])? > 0 {}
                }
                return Ok(());
            }
            Fault::Wrong(place) if (at..at + piece.len() as u64).contains(&place) => {
                piece[(place - at) as usize] ^= 1;
            }
            Fault::Slow(rate) => {
                let due = Duration::from_secs_f64(at as f64 / rate as f64);
                std::thread::sleep(due.saturating_sub(begun.elapsed()));
            }
            _ => {}
        }
        to.write_all(piece)?;
        at += piece.len() as u64;
    }
}
