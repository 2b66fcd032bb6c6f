//! A web server for tests: files of a folder, whole or in ranges, as any web server gives them.

use std::io::{BufRead as _, BufReader, Read as _, Seek as _, SeekFrom, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;

/// Serves until the process ends.
pub fn serve(folder: &Path) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("binds");
    let address = listener.local_addr().expect("is bound");
    let folder = folder.to_owned();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let folder = folder.clone();
            // A client that goes away ends its connection with an error, which is nobody's concern.
            std::thread::spawn(move || drop(answer_all(stream, &folder)));
        }
    });
    address
}

fn answer_all(stream: TcpStream, folder: &Path) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut writer = stream;
    loop {
        let mut request = String::new();
        if reader.read_line(&mut request)? == 0 {
            return Ok(());
        }
        let mut range = None;
        loop {
            let mut header = String::new();
            reader.read_line(&mut header)?;
            let header = header.trim().to_ascii_lowercase();
            if header.is_empty() {
                break;
            }
            if let Some(asked) = header.strip_prefix("range: bytes=") {
                range = asked
                    .split_once('-')
                    .map(|(from, to)| (number(from), number(to)));
            }
        }
        let mut words = request.split(' ');
        let (method, path) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
        answer(
            &mut writer,
            method,
            &folder.join(path.trim_start_matches('/')),
            range,
        )?;
    }
}

fn number(text: &str) -> u64 {
    text.trim()
        .parse()
        .expect("clients of this server send numbers")
}

fn answer(
    writer: &mut TcpStream,
    method: &str,
    path: &Path,
    range: Option<(u64, u64)>,
) -> std::io::Result<()> {
    let known = matches!(method, "GET" | "HEAD");
    let Some(mut file) = std::fs::File::open(path).ok().filter(|_| known) else {
        let status = if known {
            "404 Not Found"
        } else {
            "405 Method Not Allowed"
        };
        return write!(writer, "HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n");
    };
    let total = file.metadata()?.len();
    let (from, to) = range.unwrap_or((0, total.saturating_sub(1)));
    let (to, length) = match total {
        0 => (0, 0),
        _ => (to.min(total - 1), to.min(total - 1) + 1 - from),
    };
    let status = if range.is_some() {
        "206 Partial Content"
    } else {
        "200 OK"
    };
    write!(
        writer,
        "HTTP/1.1 {status}\r\nETag: \"{total}\"\r\nContent-Length: {length}\r\n"
    )?;
    if range.is_some() {
        write!(writer, "Content-Range: bytes {from}-{to}/{total}\r\n")?;
    }
    write!(writer, "\r\n")?;
    if method == "GET" {
        file.seek(SeekFrom::Start(from))?;
        std::io::copy(&mut file.take(length), writer)?;
    }
    Ok(())
}
