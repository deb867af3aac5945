//! What is wrong with the text of mods.

/// What is wrong with the text of [`Mods`](crate::Mods), and where.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}, column {column}: {what}")]
#[non_exhaustive]
pub struct ModError {
    /// The line of the text, from 1.
    pub line: u32,
    /// The byte of the line, from 1.
    pub column: u32,
    /// What is wrong, and what would be right.
    pub what: String,
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
        ModError { line, column: (start - line_start) as u32 + 1, what: self.what }
    }
}
