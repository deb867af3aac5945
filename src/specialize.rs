//! WGSL text and constants in, the source of one module out.
//!
//! Directives stand alone on a line: `#include "file" name=text …` (which puts `text` for `$name` in that
//! file), `#if NAME`, `#if !NAME`, `#else`, `#endif`. Switches are named by `#if`; constants become
//! `const NAME = …u;` at the top, after the file's own `enable` lines. `#unroll` before a loop
//! `for (var n = 0u; n < NAME; n++) {` writes it out, NAME being a constant, if the switch `UNROLL` is on: WGSL has
//! no such hint, and an array of matrices is in registers only where its indices are constants. Every line of the
//! result remembers where it came from.

macro_rules! files {
    ($($path:literal,)*) => { &[$(($path, include_str!(concat!("../shaders/", $path)))),*] };
}

/// Every shader file, by its path under `shaders/`.
const FILES: &[(&str, &str)] = files![
    "attention/attention.wgsl",
    "attention/blocks.wgsl",
    "attention/dropout.wgsl",
    "attention/finish.wgsl",
    "attention/given.wgsl",
    "attention/keep.wgsl",
    "attention/mods.wgsl",
    "attention/probe.wgsl",
    "attention/problem.wgsl",
    "attention/score.wgsl",
    "attention/sequence.wgsl",
    "attention/softmax.wgsl",
    "attention/tiles.wgsl",
    "kernel/backward_bias_coop.wgsl",
    "kernel/backward_delta.wgsl",
    "kernel/backward_dkdv_coop.wgsl",
    "kernel/backward_dkdv_coop_scaled.wgsl",
    "kernel/backward_dkdv_coop_workgroup.wgsl",
    "kernel/backward_dkdv_tile.wgsl",
    "kernel/backward_dq_coop.wgsl",
    "kernel/backward_dq_coop_scaled.wgsl",
    "kernel/backward_dq_coop_workgroup.wgsl",
    "kernel/backward_dq_tile.wgsl",
    "kernel/backward_fused_tile.wgsl",
    "kernel/backward_heads.wgsl",
    "kernel/backward_scores_tile.wgsl",
    "kernel/block_kinds_of_lists.wgsl",
    "kernel/block_kinds_of_mask.wgsl",
    "kernel/block_lists.wgsl",
    "kernel/coop_ranges.wgsl",
    "kernel/coop_sizes.wgsl",
    "kernel/decode_combine.wgsl",
    "kernel/decode_split.wgsl",
    "kernel/forward_coop.wgsl",
    "kernel/forward_coop_scaled.wgsl",
    "kernel/forward_coop_workgroup.wgsl",
    "kernel/forward_tile.wgsl",
    "kernel/naive_backward_key_value.wgsl",
    "kernel/naive_backward_query.wgsl",
    "kernel/naive_backward_scores.wgsl",
    "kernel/naive_output.wgsl",
    "kernel/naive_product.wgsl",
    "kernel/naive_scores.wgsl",
    "kernel/naive_softmax.wgsl",
    "matrix/coop_step.wgsl",
    "matrix/coop_tiles.wgsl",
    "matrix/elements.wgsl",
    "matrix/exchange.wgsl",
    "matrix/layout.wgsl",
    "matrix/load.wgsl",
    "matrix/matrices.wgsl",
    "matrix/own_rows.wgsl",
    "matrix/pairs.wgsl",
    "matrix/parts.wgsl",
    "matrix/row_sizes.wgsl",
    "matrix/rows_in.wgsl",
    "matrix/rows_out.wgsl",
    "matrix/scores.wgsl",
    "matrix/sizes.wgsl",
    "matrix/staged_rows.wgsl",
    "memory/elements.wgsl",
    "memory/elements_f16.wgsl",
    "memory/pairs.wgsl",
    "memory/read.wgsl",
    "memory/read_f16.wgsl",
    "memory/row_stats.wgsl",
    "memory/write.wgsl",
    "memory/write_f16.wgsl",
    "tile/chunks.wgsl",
    "tile/columns.wgsl",
    "tile/dropout.wgsl",
    "tile/lines.wgsl",
    "tile/load.wgsl",
    "tile/outer.wgsl",
    "tile/products.wgsl",
    "tile/result.wgsl",
    "tile/scores.wgsl",
    "tile/threads.wgsl",
];

/// Which module: a shader file, the switches that are on, and its constants. Equal specialisations are one pipeline.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Specialization {
    /// The file under `shaders/`.
    pub file: &'static str,
    /// The name of its entry point.
    pub entry: &'static str,
    /// Names that `#if` finds true.
    pub switches: Vec<&'static str>,
    /// Constants of type u32.
    pub constants: Vec<(&'static str, u32)>,
}

/// The source of a module, and where its lines come from.
#[derive(Clone, Debug)]
pub struct Source {
    /// WGSL.
    pub text: String,
    lines: Vec<(&'static str, usize)>,
}

impl Source {
    fn push(&mut self, line: &str, from: (&'static str, usize)) {
        self.text.push_str(line);
        self.text.push('\n');
        self.lines.push(from);
    }

    /// The shader file and line (from 1) behind line `line` (from 1) of the text.
    pub fn origin(&self, line: usize) -> Option<(&'static str, usize)> {
        self.lines.get(line.checked_sub(1)?).copied()
    }
}

const NO_LOOP: &str = "#unroll needs a loop `for (var n = 0u; n < NAME; n++) {` up to a constant of the module";

/// A line and where it comes from.
type Line<'a> = (&'a str, (&'static str, usize));

/// A directive that could not be followed. The library's own shaders have none: a test specialises each of them.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("shaders/{file}:{line}: {what}")]
pub struct SpecializeError {
    /// The file under `shaders/`.
    pub file: String,
    /// The line, from 1.
    pub line: usize,
    /// What is wrong.
    pub what: String,
}

impl Specialization {
    /// The module's source.
    pub fn source(&self) -> Result<Source, SpecializeError> {
        self.source_from(FILES)
    }

    fn source_from(&self, files: &[(&'static str, &'static str)]) -> Result<Source, SpecializeError> {
        let mut out = Source { text: String::new(), lines: vec![] };
        let text = files.iter().find(|(path, _)| *path == self.file).map_or("", |(_, text)| text);
        for (number, line) in text.lines().enumerate().filter(|(_, line)| line.starts_with("enable ")) {
            out.push(line, (self.file, number + 1));
        }
        for (name, value) in &self.constants {
            out.push(&format!("const {name} = {value}u;"), (self.file, 0));
        }
        self.expand(files, self.file, &[], &mut vec![], &mut out)?;
        self.unroll(&out)
    }

    /// Follows the lines `#unroll`, which [`Self::expand`] leaves.
    fn unroll(&self, source: &Source) -> Result<Source, SpecializeError> {
        let lines: Vec<_> = source.text.lines().zip(source.lines.iter().copied()).collect();
        let mut out = Source { text: String::new(), lines: vec![] };
        self.unroll_lines(&lines, &mut out)?;
        Ok(out)
    }

    fn unroll_lines(&self, mut lines: &[Line<'_>], out: &mut Source) -> Result<(), SpecializeError> {
        while let Some((&(line, from), rest)) = lines.split_first() {
            lines = rest;
            if line.trim_start() != "#unroll" {
                out.push(line, from);
                continue;
            }
            if !self.switches.contains(&"UNROLL") {
                continue;
            }
            let Some((name, count, end)) = self.counted_loop(lines) else {
                return Err(SpecializeError { file: from.0.into(), line: from.1, what: NO_LOOP.into() });
            };
            for n in 0..count {
                out.push(&format!("{{ const {name} = {n}u;"), lines[0].1);
                self.unroll_lines(&lines[1..end], out)?;
                out.push("}", lines[end].1);
            }
            lines = &lines[end + 1..];
        }
        Ok(())
    }

    /// The variable of the loop that begins here, its number of trips, and its last line: the brace that is as far to
    /// the right as the loop.
    fn counted_loop<'a>(&self, lines: &[Line<'a>]) -> Option<(&'a str, u32, usize)> {
        let head = lines.first()?.0;
        let indent = &head[..head.len() - head.trim_start().len()];
        let (name, rest) = head.trim_start().strip_prefix("for (var ")?.split_once(" = 0u; ")?;
        let bound = rest.strip_prefix(name)?.strip_prefix(" < ")?.strip_suffix(&format!("; {name}++) {{"))?;
        let &(_, count) = self.constants.iter().find(|(constant, _)| *constant == bound)?;
        let end = lines.iter().position(|(line, _)| line.strip_prefix(indent) == Some("}"))?;
        Some((name, count, end))
    }

    fn expand(
        &self,
        files: &[(&'static str, &'static str)],
        file: &str,
        names: &[(&str, &str)],
        including: &mut Vec<&'static str>,
        out: &mut Source,
    ) -> Result<(), SpecializeError> {
        let error = |file: &str, line: usize, what: String| SpecializeError { file: file.into(), line, what };
        let Some(&(path, text)) = files.iter().find(|(path, _)| *path == file) else {
            return Err(error(file, 1, "no such file".into()));
        };
        if including.contains(&path) {
            return Err(error(path, 1, "includes itself".into()));
        }
        including.push(path);
        // One entry for each open #if: the line it opened on, whether its lines count, whether #else was seen.
        let mut open: Vec<(usize, bool, bool)> = vec![];
        for (number, line) in text.lines().enumerate().map(|(n, line)| (n + 1, line)) {
            let active = open.iter().all(|&(_, on, _)| on);
            let Some(directive) = line.trim_start().strip_prefix('#') else {
                if active && !line.starts_with("enable ") {
                    let mut line = line.to_string();
                    for (name, value) in names {
                        line = line.replace(&format!("${name}"), value);
                    }
                    out.push(&line, (path, number));
                }
                continue;
            };
            let (word, rest) = directive.split_once(' ').unwrap_or((directive, ""));
            let rest = rest.trim();
            match word {
                "if" => {
                    let (name, wanted) = rest.strip_prefix('!').map_or((rest, true), |name| (name, false));
                    if name.is_empty() {
                        return Err(error(path, number, "#if needs a name".into()));
                    }
                    open.push((number, self.switches.contains(&name) == wanted, false));
                }
                "else" => match open.last_mut() {
                    Some((_, on, seen @ false)) => (*on, *seen) = (!*on, true),
                    _ => return Err(error(path, number, "#else without #if".into())),
                },
                "endif" => {
                    if open.pop().is_none() {
                        return Err(error(path, number, "#endif without #if".into()));
                    }
                }
                "include" if active => {
                    let mut words = rest.split_whitespace();
                    let target = words.next().and_then(|w| w.strip_prefix('"')?.strip_suffix('"'));
                    let Some(target) = target else {
                        return Err(error(path, number, "#include needs a file in quotes".into()));
                    };
                    let names: Option<Vec<_>> = words.map(|w| w.split_once('=')).collect();
                    let Some(names) = names else {
                        return Err(error(path, number, "#include takes name=text after the file".into()));
                    };
                    if !files.iter().any(|(path, _)| *path == target) {
                        return Err(error(path, number, format!("no file {target:?} to include")));
                    }
                    self.expand(files, target, &names, including, out)?;
                }
                "include" => {}
                "unroll" if active => out.push(line, (path, number)),
                "unroll" => {}
                _ => return Err(error(path, number, format!("unknown directive #{word}"))),
            }
        }
        if let Some(&(line, _, _)) = open.last() {
            return Err(error(path, line, "#if without #endif".into()));
        }
        including.pop();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expand(files: &[(&'static str, &'static str)], switches: &[&'static str]) -> Result<Source, SpecializeError> {
        let main =
            Specialization { file: "main", entry: "main", switches: switches.to_vec(), constants: vec![("WIDTH", 4)] };
        main.source_from(files)
    }

    #[test]
    fn includes_conditions_and_constants() {
        let files = [
            (
                "main",
                "#include \"part\" x=query\n#if FAST\nfast\n#else\nslow\n#endif\n#if !FAST\nalso slow\n#endif\nend\n",
            ),
            ("part", "read_$x($x)\n"),
        ];
        let slow = expand(&files, &[]).unwrap();
        assert_eq!(slow.text, "const WIDTH = 4u;\nread_query(query)\nslow\nalso slow\nend\n");
        assert_eq!(slow.origin(2), Some(("part", 1)));
        assert_eq!(slow.origin(5), Some(("main", 10)));
        assert_eq!(slow.origin(6), None);
        let fast = expand(&files, &["FAST"]).unwrap();
        assert_eq!(fast.text, "const WIDTH = 4u;\nread_query(query)\nfast\nend\n");
    }

    #[test]
    fn nothing_inside_a_false_condition_counts() {
        let files = [("main", "#if A\n#include \"missing\"\n#if B\nx\n#else\ny\n#endif\n#endif\n")];
        assert_eq!(expand(&files, &["B"]).unwrap().text, "const WIDTH = 4u;\n");
    }

    #[test]
    fn loops_are_written_out_where_that_is_on() {
        let text = "#unroll\nfor (var a = 0u; a < TWO; a++) {\n    x\n    #unroll\n    for (var b = 0u; b < TWO; b++) {\n        \
                    if y {\n        }\n    }\n}\nend\n";
        let module = |switches| {
            let main = Specialization { file: "main", entry: "main", switches, constants: vec![("TWO", 2)] };
            main.source_from(&[("main", text)]).unwrap()
        };
        let out = module(vec!["UNROLL"]);
        let inner = |b| format!("{{ const b = {b}u;\n        if y {{\n        }}\n}}\n");
        let outer = |a| format!("{{ const a = {a}u;\n    x\n{}{}}}\n", inner(0), inner(1));
        assert_eq!(out.text, format!("const TWO = 2u;\n{}{}end\n", outer(0), outer(1)));
        assert_eq!(out.origin(5), Some(("main", 6)));
        assert!(module(vec![]).text.contains("for (var a = 0u; a < TWO; a++) {\n    x\n    for"));
    }

    #[test]
    fn errors_name_file_and_line() {
        for (text, line, what) in [
            ("x\n#if A\n", 2, "#if without #endif"),
            ("#endif\n", 1, "#endif without #if"),
            ("#if A\n#else\n#else\n#endif\n", 3, "#else without #if"),
            ("#if\n#endif\n", 1, "#if needs a name"),
            ("a\nb\n#include \"nowhere\"\n", 3, "no file \"nowhere\" to include"),
            ("#include nowhere\n", 1, "#include needs a file in quotes"),
            ("#include \"main\" x\n", 1, "#include takes name=text after the file"),
            ("#include \"main\"\n", 1, "includes itself"),
            ("#define X\n", 1, "unknown directive #define"),
            ("x\n#unroll\nfor (var n = 0u; n < m; n++) {\n}\n", 2, NO_LOOP),
            ("#unroll\nfor (var n = 0u; n < WIDTH; n++) {\n", 1, NO_LOOP),
            ("#unroll\n", 1, NO_LOOP),
        ] {
            let error = expand(&[("main", text)], &["UNROLL"]).unwrap_err();
            assert_eq!((error.line, error.what.as_str()), (line, what), "{text:?}");
            assert_eq!(error.file, "main");
        }
    }
}
