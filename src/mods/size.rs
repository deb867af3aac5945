//! How large and how deep a text of mods may be. naga, and what is done to its modules here, go down into expressions and calls by recursion,
//! on a stack that may be small. So this is found out of the text alone, before naga reads it.

use naga::Span;

use super::error::Refusal;

/// Bytes.
const MOST_BYTES: usize = 1 << 16;
const MOST_FUNCTIONS: usize = 256;
/// Operators of one expression, with those around the parentheses that it stands in. naga reads no more than so many levels of what it wrote.
const MOST_OPERATORS: usize = 100;
/// `else` of one `if`.
const MOST_ELSES: usize = 50;

/// What is counted in a bracket that is open, or outside of all.
#[derive(Clone, Copy, Default)]
struct Bracket {
    /// The operators of the expression that it stands in.
    around: usize,
    /// These, and those of the expression that is read.
    operators: usize,
    /// How many `else` have followed one another.
    elses: usize,
}

/// Refuses texts that are too long or too deep, before naga reads them.
pub(super) fn check_size(text: &str) -> Result<(), Refusal> {
    let refuse = |place: usize, what: String| Err(Refusal::new(Span::new(place as u32, place as u32), what));
    if text.len() > MOST_BYTES {
        return refuse(0, format!("the text has {} bytes; at most {MOST_BYTES}", text.len()));
    }
    let mut functions = 0;
    let mut open = vec![Bracket::default()];
    let (mut before, mut large) = ("", LargeConstants::default());
    for (place, token) in tokens(text) {
        functions += usize::from(token == "fn");
        let depth = open.len() - 1;
        if before == "}" && token != "else" {
            open[depth].elses = 0;
        }
        // What is outside of all brackets is never closed.
        if [")", "]", "}"].contains(&token) && depth > 0 {
            open.pop();
        }
        let depth = open.len() - 1;
        let inner = &mut open[depth];
        match token {
            "else" => inner.elses += 1,
            ";" | "," | "}" => inner.operators = inner.around,
            ")" | "]" => {}
            "{" => open.push(Bracket::default()),
            "(" | "[" => {
                let around = inner.operators + 1;
                open.push(Bracket { around, operators: around, elses: 0 });
            }
            _ => inner.operators += usize::from(!token.starts_with(|c: char| c.is_alphanumeric() || "_:@".contains(c))),
        }
        let Bracket { operators, elses, .. } = open[open.len() - 1];
        if functions > MOST_FUNCTIONS {
            return refuse(place, format!("mods have at most {MOST_FUNCTIONS} functions"));
        }
        if operators > MOST_OPERATORS {
            let what = format!(
                "an expression has at most {MOST_OPERATORS} operators, with the parentheses it stands in; give parts of it names by `let`"
            );
            return refuse(place, what);
        }
        if elses > MOST_ELSES {
            return refuse(place, format!("an `if` has at most {MOST_ELSES} `else`; take `switch`, or an array"));
        }
        if large.are_nested_by(before, token) {
            return refuse(
                place,
                "a constant of many numbers is not made of others; write its numbers, or read a buffer".into(),
            );
        }
        before = token;
    }
    Ok(())
}

/// Constants whose declaration names an array or a struct. naga copies such a constant, with all that it is made of, wherever it is named. So one
/// that is made of two others, which are made of two others, takes for ever.
#[derive(Default)]
struct LargeConstants<'t> {
    structs: Vec<&'t str>,
    names: Vec<&'t str>,
    /// In a declaration: its name, whether it makes something large, and whether it names a constant that is large.
    open: Option<(&'t str, bool, bool)>,
}

impl<'t> LargeConstants<'t> {
    /// Takes the next word or sign, after the one before it, and says whether it is of a large constant that is made of another.
    fn are_nested_by(&mut self, before: &str, token: &'t str) -> bool {
        match (before, &mut self.open) {
            ("struct", _) => self.structs.push(token),
            ("const", _) => self.open = Some((token, false, false)),
            (_, Some((name, makes, _))) if token == ";" => {
                if *makes {
                    self.names.push(name);
                }
                self.open = None;
            }
            (_, Some((_, makes, names))) => {
                *makes |= token == "array" || self.structs.contains(&token);
                *names |= self.names.contains(&token);
            }
            _ => {}
        }
        self.open.is_some_and(|(_, makes, names)| makes && names)
    }
}

/// The operators of more than one sign, longer ones first.
const LONG_OPERATORS: [&str; 21] = [
    "<<=", ">>=", "&&", "||", "==", "!=", "<=", ">=", "<<", ">>", "+=", "-=", "*=", "/=", "%=", "&=", "|=", "^=", "->",
    "++", "--",
];

/// Words, numbers, operators and other signs, without comments, and where they begin.
fn tokens(text: &str) -> impl Iterator<Item = (usize, &str)> {
    const LINE_ENDS: [char; 7] = ['\n', '\r', '\u{b}', '\u{c}', '\u{85}', '\u{2028}', '\u{2029}'];
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let mut place = 0;
    std::iter::from_fn(move || {
        loop {
            let rest = &text[place..];
            let first = rest.chars().next()?;
            if rest.starts_with("//") {
                place += rest.find(LINE_ENDS).unwrap_or(rest.len());
            } else if rest.starts_with("/*") {
                place += comment(rest);
            } else if first.is_whitespace() {
                place += first.len_utf8();
            } else {
                let length = if is_word(first) {
                    let number = first.is_ascii_digit();
                    let word = |rest: &str| rest.find(|c| !(is_word(c) || number && c == '.')).unwrap_or(rest.len());
                    let n = word(rest);
                    // The sign of an exponent is of the number.
                    let signed = number && rest[..n].ends_with(['e', 'E', 'p', 'P']);
                    if signed && rest[n..].starts_with(['+', '-']) { n + 1 + word(&rest[n + 1..]) } else { n }
                } else {
                    LONG_OPERATORS.iter().find(|op| rest.starts_with(**op)).map_or(first.len_utf8(), |op| op.len())
                };
                place += length;
                return Some((place - length, &rest[..length]));
            }
        }
    })
}

/// The length of a comment, in which there may be others.
fn comment(text: &str) -> usize {
    let mut depth = 0;
    let mut place = 0;
    while place < text.len() {
        let rest = &text.as_bytes()[place..];
        let mark = [rest.starts_with(b"/*"), rest.starts_with(b"*/")];
        depth = depth + i32::from(mark[0]) - i32::from(mark[1]);
        place += if mark.contains(&true) { 2 } else { 1 };
        if depth == 0 {
            break;
        }
    }
    (place..=text.len()).find(|&n| text.is_char_boundary(n)).unwrap_or(text.len())
}
