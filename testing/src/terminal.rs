//! What commands say and are asked: text that is safe on a terminal, progress, an option that several have.

use std::fmt::{Display, Write};
use std::io::IsTerminal;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use wgpu_flash_attention::CoopForm;

/// The text with every character that a terminal may obey written as Rust writes it in a literal. Line breaks stay if `lines`
/// says so. Names in files and names of files may hold escape sequences, which would otherwise reach the terminal.
pub fn harmless(text: &str, lines: bool) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        let escaped = c.escape_debug();
        match c {
            '\n' if lines => safe.push(c),
            '"' | '\'' | '\\' => safe.push(c),
            // A character that one can see is left as it is.
            _ if escaped.len() == 1 => safe.push(c),
            _ => safe.extend(escaped),
        }
    }
    safe
}

/// The command's arguments. The error is what is wrong with them, without the pages on usage that clap puts after it. Where help or the version
/// was asked for, that is printed and the process ends.
pub fn arguments<A: Parser>() -> Result<A, String> {
    A::try_parse().map_err(|error| {
        if !error.use_stderr() {
            error.exit();
        }
        let text = error.to_string();
        let wrong: Vec<_> = text.lines().take_while(|line| !line.is_empty()).map(str::trim).collect();
        wrong.join(" ").trim_start_matches("error: ").to_string()
    })
}

/// How many characters of a name are shown.
const LONGEST_NAME: usize = 40;

/// A name from a file, in quotes. A long one is cut, since a file may hold names of any length.
pub fn quoted(name: &str) -> String {
    match name.char_indices().nth(LONGEST_NAME) {
        None => format!("{name:?}"),
        Some((end, _)) => format!("{:?}… ({} characters)", &name[..end], name.chars().count()),
    }
}

/// Names from a file, in quotes. The first eight are shown, since a file may hold any number.
pub fn quoted_list<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    let names: Vec<_> = names.into_iter().collect();
    first_few(&names.iter().map(|name| quoted(name)).collect::<Vec<_>>())
}

/// Items with commas in between, eight at most.
pub fn first_few<T: Display>(items: &[T]) -> String {
    let mut text = String::new();
    for (n, item) in items.iter().take(8).enumerate() {
        let _ = write!(text, "{}{item}", if n == 0 { "" } else { ", " });
    }
    match items.len() {
        more @ 9.. => format!("{text} and {} more", more - 8),
        _ => text,
    }
}

/// A text by a library that may quote a file, cut where it becomes long.
pub fn cut(text: impl Display) -> String {
    let text = text.to_string();
    match text.char_indices().nth(200) {
        None => text,
        Some((end, _)) => format!("{}…", &text[..end]),
    }
}

/// A number of bytes in the unit that one would say it in.
pub fn bytes(bytes: u64) -> String {
    let units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
    let (mut size, mut unit) = (bytes as f64, 0);
    while size >= 1024.0 && unit + 1 < units.len() {
        (size, unit) = (size / 1024.0, unit + 1);
    }
    let decimals = if unit == 0 || size >= 100.0 { 0 } else { 1 };
    format!("{size:.decimals$} {}", units[unit])
}

/// Says on stderr what takes more than a second: on a terminal with the seconds as they pass, elsewhere in one line.
pub struct Progress {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Progress {
    /// `command` is who speaks. What is said ends when the value is dropped.
    pub fn of(command: &'static str, what: impl Display) -> Self {
        let (stop, stopped) = channel();
        let what = harmless(&what.to_string(), false);
        let watch = move || {
            if stopped.recv_timeout(Duration::from_secs(1)) != Err(RecvTimeoutError::Timeout) {
                return;
            }
            if !std::io::stderr().is_terminal() {
                eprintln!("{command}: {what} …");
                return;
            }
            let bar = ProgressBar::new_spinner();
            if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} … {elapsed}") {
                bar.set_style(style);
            }
            bar.set_message(what);
            bar.enable_steady_tick(Duration::from_millis(100));
            let _ = stopped.recv();
            bar.finish_and_clear();
        };
        // Where no thread is to be had, nothing is said.
        let thread = std::thread::Builder::new().spawn(watch).ok();
        Progress { stop: Some(stop), thread }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.stop.take();
        // The line must be gone before anything else is printed.
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The forms of the coop kernel, as options name them.
#[derive(Clone, Copy, clap::ValueEnum)]
pub enum Form {
    Registers,
    WorkgroupMemory,
}

impl From<Form> for CoopForm {
    fn from(form: Form) -> Self {
        match form {
            Form::Registers => CoopForm::Registers,
            Form::WorkgroupMemory => CoopForm::WorkgroupMemory,
        }
    }
}
