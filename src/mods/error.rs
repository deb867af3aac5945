//! What is wrong with the text of mods.

/// What is wrong with the text of [`Mods`](crate::Mods), and where. In words it ends with the line and a mark below the place.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}, column {column}: {what}{}", shown(.text_line, *.column))]
#[non_exhaustive]
pub struct ModError {
    /// The line of the text, from 1.
    pub line: u32,
    /// The byte of the line, from 1.
    pub column: u32,
    /// What is wrong, and what would be right.
    pub what: String,
    /// That line of the text, without its end.
    pub text_line: String,
}

/// The line and a mark below its byte `column`, from 1. Of a long line it is what lies around the mark. In the place of characters that a terminal
/// might obey are blanks.
fn shown(line: &str, column: u32) -> String {
    const AROUND: usize = 60;
    let before = line.char_indices().take_while(|(place, _)| place + 1 < column as usize).count();
    let first = before.saturating_sub(AROUND);
    let part = line.chars().skip(first).take(2 * AROUND);
    let part: String = part.map(|c| if is_hidden(c) { ' ' } else { c }).collect();
    if part.trim().is_empty() {
        return String::new();
    }
    format!("\n    {}\n    {}^", part.trim_end(), " ".repeat(before - first))
}

/// Whether one does not see a character, so that Rust escapes it in a literal. Quotes and backslashes are escaped for another reason.
pub(super) fn is_hidden(c: char) -> bool {
    !['"', '\'', '\\'].contains(&c) && c.escape_debug().len() > 1
}

/// Something that mods may not do, and where in the text it stands.
pub(super) struct Refusal {
    pub span: naga::Span,
    pub what: String,
}

impl Refusal {
    pub fn new(span: naga::Span, what: impl Into<String>) -> Self {
        Refusal { span, what: what.into() }
    }

    /// The same with a line and a column. What lies past the text, in the prelude, is put at its end.
    pub fn of(self, text: &str) -> ModError {
        let start = self.span.to_range().map_or(0, |range| range.start.min(text.len()));
        let before = &text.as_bytes()[..start];
        let line_start = before.iter().rposition(|&byte| byte == b'\n').map_or(0, |place| place + 1);
        let line = before.iter().filter(|&&byte| byte == b'\n').count() as u32 + 1;
        // The place may lie within a character, and the line begins at one.
        let text_line = text[line_start..].lines().next().unwrap_or_default().to_string();
        ModError { line, column: (start - line_start) as u32 + 1, what: self.what, text_line }
    }
}
