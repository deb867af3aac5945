//! The kernels in a browser: the part that makes the page, serves it and starts the browser.
//!
//! `flash-attention-web-test MODULE FOLDER QUERY [BROWSER...]` turns cargo's wasm MODULE into one that browsers load, in FOLDER,
//! and serves the page on a port of this machine. It starts BROWSER with the page's address and QUERY as its last argument, prints
//! what the page says, and exits with 0 if every case passed. Without BROWSER it prints the address and serves until the page of
//! a browser that you start is done.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

type Error = Box<dyn std::error::Error + Send + Sync>;

/// The longest silence of a page that works: software WebGPU takes half a minute to compile a large module.
const SILENCE: Duration = Duration::from_secs(120);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [module, folder, query, browser @ ..] = &arguments[..] else {
        eprintln!("usage: flash-attention-web-test MODULE FOLDER QUERY [BROWSER...]");
        return ExitCode::from(2);
    };
    match run(Path::new(module), Path::new(folder), query, browser) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            println!("FAIL {error}");
            ExitCode::FAILURE
        }
    }
}

/// The number of failures that the page counts.
fn run(module: &Path, folder: &Path, query: &str, browser: &[String]) -> Result<u32, Error> {
    wasm_bindgen_cli_support::Bindgen::new()
        .input_path(module)
        .out_name("web")
        .web(true)?
        .typescript(false)
        .generate(folder)?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = format!("http://localhost:{}/?{query}", listener.local_addr()?.port());
    let (said, says) = mpsc::channel();
    let served = folder.to_path_buf();
    std::thread::spawn(move || serve(&listener, &served, &said));
    let Some((program, options)) = browser.split_first() else {
        println!("open {address}");
        return listen(&says, None);
    };
    // What browsers print is about buses, displays and keys that a machine without a desktop does not have.
    let child = Command::new(program).args(options).arg(&address).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let mut child = child.map_err(|error| format!("{program}: {error}"))?;
    let result = listen(&says, Some(&mut child));
    let _ = child.kill();
    let _ = child.wait();
    result
}

/// Prints what the page says, until it is done.
fn listen(says: &mpsc::Receiver<Said>, mut browser: Option<&mut Child>) -> Result<u32, Error> {
    let mut last = Instant::now();
    loop {
        match says.recv_timeout(Duration::from_secs(1)) {
            Ok(Said::Line(line)) => println!("{line}"),
            Ok(Said::Done(failed)) => return Ok(failed.trim().parse()?),
            Err(RecvTimeoutError::Disconnected) => return Err("the server ended".into()),
            Err(RecvTimeoutError::Timeout) => {
                let Some(browser) = &mut browser else { continue };
                if let Some(status) = browser.try_wait()? {
                    return Err(format!("the browser ended before the page was done: {status}").into());
                }
                if last.elapsed() > SILENCE {
                    return Err(format!("the page has said nothing for {} s", SILENCE.as_secs()).into());
                }
                continue;
            }
        }
        last = Instant::now();
    }
}

enum Said {
    Line(String),
    Done(String),
}

fn serve(listener: &TcpListener, folder: &Path, said: &Sender<Said>) {
    for stream in listener.incoming().flatten() {
        let (folder, said) = (folder.to_path_buf(), said.clone());
        // Browsers open connections that they do not use yet.
        std::thread::spawn(move || answer(stream, &folder, &said));
    }
}

/// Answers one request, and closes the connection.
fn answer(stream: TcpStream, folder: &Path, said: &Sender<Said>) -> Result<(), Error> {
    let mut reader = BufReader::new(&stream);
    let mut request = String::new();
    reader.read_line(&mut request)?;
    let mut length = 0;
    loop {
        let mut header = String::new();
        if reader.read_line(&mut header)? == 0 || header.trim().is_empty() {
            break;
        }
        match header.split_once(':') {
            Some((name, value)) if name.eq_ignore_ascii_case("content-length") => length = value.trim().parse()?,
            _ => {}
        }
    }
    let mut words = request.split_whitespace();
    let (method, target) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
    let path = target.split('?').next().unwrap_or("");
    let (status, kind, body) = match (method, path) {
        ("POST", "/line" | "/done") => {
            let mut text = String::new();
            reader.take(length).read_to_string(&mut text)?;
            said.send(if path == "/done" { Said::Done(text) } else { Said::Line(text) })?;
            ("200 OK", "text/plain", vec![])
        }
        ("GET", "/") => ("200 OK", "text/html", include_bytes!("index.html").to_vec()),
        ("GET", "/web.js") => ("200 OK", "text/javascript", std::fs::read(folder.join("web.js"))?),
        ("GET", "/web_bg.wasm") => ("200 OK", "application/wasm", std::fs::read(folder.join("web_bg.wasm"))?),
        _ => ("404 Not Found", "text/plain", vec![]),
    };
    let length = body.len();
    let mut stream = &stream;
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
    )?;
    stream.write_all(&body)?;
    Ok(())
}
