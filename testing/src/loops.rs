//! A check of our own over a module's text, for a fault of browsers that naga does not have.

/// The first `var` inside a loop that has no initialiser, as its line's number and text.
///
/// WGSL says that such a variable is zero in each iteration. Chromium and Firefox zero it once per function call
/// (gfx-rs/wgpu#9489), so that the second iteration finds what the first one left. `var x = T();` is right everywhere.
pub fn uninitialised_in_loop(text: &str) -> Option<(usize, &str)> {
    // For each open brace, whether it is a loop's.
    let mut open: Vec<bool> = vec![];
    let mut opens_loop = false;
    for (number, line) in text.lines().enumerate() {
        let code = line.split("//").next().unwrap_or(line);
        // A `var` in the head of `for` has an initialiser; statements of one line are looked at one by one.
        for statement in code.split_inclusive(['{', '}', ';']) {
            let words = statement.trim();
            let declares = words.starts_with("var ") || words.starts_with("var<function>");
            if declares && words.ends_with(';') && !words.contains('=') && open.contains(&true) {
                return Some((number + 1, line));
            }
            opens_loop |= words.split(|c: char| !c.is_alphanumeric() && c != '_').any(is_loop);
            match statement.chars().last() {
                Some('{') => open.push(std::mem::take(&mut opens_loop)),
                Some('}') => drop(open.pop()),
                _ => {}
            }
        }
    }
    None
}

fn is_loop(word: &str) -> bool {
    ["for", "while", "loop", "continuing"].contains(&word)
}
