//! WGSL text and constants in, the source of one module out.
//!
//! Directives stand alone on a line: `#include "file" name=text …` (which puts `text` for `$name` in that
//! file), `#if NAME`, `#if !NAME`, `#else`, `#endif`. Switches are named by `#if`; constants become
//! `const NAME = …u;` at the top, after the file's own `enable` lines. Every line of the result remembers where it came from.

use std::fmt::Write;

use crate::elements::{MatrixFormat, MatrixLayout};
use crate::kernel::{
    self, backward_coop, backward_delta, backward_naive, backward_tile, decode, forward_coop, forward_tile, naive,
};
use crate::tune::{BackwardTile, CoopBackwardTile, CoopTile, DecodeTile, Tile};
use crate::{MergeProblem, Problem};

/// Every shader file, by its path under `shaders/`.
const FILES: &[(&str, &str)] = &[
    ("backward_delta.wgsl", include_str!("../shaders/backward_delta.wgsl")),
    ("backward_dkdv_coop.wgsl", include_str!("../shaders/backward_dkdv_coop.wgsl")),
    ("backward_dkdv_coop_scaled.wgsl", include_str!("../shaders/backward_dkdv_coop_scaled.wgsl")),
    ("backward_dkdv_tile.wgsl", include_str!("../shaders/backward_dkdv_tile.wgsl")),
    ("backward_dq_coop.wgsl", include_str!("../shaders/backward_dq_coop.wgsl")),
    ("backward_dq_coop_scaled.wgsl", include_str!("../shaders/backward_dq_coop_scaled.wgsl")),
    ("backward_dq_tile.wgsl", include_str!("../shaders/backward_dq_tile.wgsl")),
    ("common/elements.wgsl", include_str!("../shaders/common/elements.wgsl")),
    ("common/elements_f16.wgsl", include_str!("../shaders/common/elements_f16.wgsl")),
    ("common/matrices.wgsl", include_str!("../shaders/common/matrices.wgsl")),
    ("common/matrix_elements.wgsl", include_str!("../shaders/common/matrix_elements.wgsl")),
    ("common/matrix_layout.wgsl", include_str!("../shaders/common/matrix_layout.wgsl")),
    ("common/matrix_load.wgsl", include_str!("../shaders/common/matrix_load.wgsl")),
    ("common/matrix_pairs.wgsl", include_str!("../shaders/common/matrix_pairs.wgsl")),
    ("common/matrix_parts.wgsl", include_str!("../shaders/common/matrix_parts.wgsl")),
    ("common/problem.wgsl", include_str!("../shaders/common/problem.wgsl")),
    ("common/read.wgsl", include_str!("../shaders/common/read.wgsl")),
    ("common/read_f16.wgsl", include_str!("../shaders/common/read_f16.wgsl")),
    ("common/score.wgsl", include_str!("../shaders/common/score.wgsl")),
    ("common/softmax.wgsl", include_str!("../shaders/common/softmax.wgsl")),
    ("common/tile_load.wgsl", include_str!("../shaders/common/tile_load.wgsl")),
    ("common/tile_products.wgsl", include_str!("../shaders/common/tile_products.wgsl")),
    ("common/tile_result.wgsl", include_str!("../shaders/common/tile_result.wgsl")),
    ("common/write.wgsl", include_str!("../shaders/common/write.wgsl")),
    ("common/write_f16.wgsl", include_str!("../shaders/common/write_f16.wgsl")),
    ("decode_combine.wgsl", include_str!("../shaders/decode_combine.wgsl")),
    ("decode_split.wgsl", include_str!("../shaders/decode_split.wgsl")),
    ("forward_coop.wgsl", include_str!("../shaders/forward_coop.wgsl")),
    ("forward_coop_scaled.wgsl", include_str!("../shaders/forward_coop_scaled.wgsl")),
    ("forward_tile.wgsl", include_str!("../shaders/forward_tile.wgsl")),
    ("naive_backward_key_value.wgsl", include_str!("../shaders/naive_backward_key_value.wgsl")),
    ("naive_backward_query.wgsl", include_str!("../shaders/naive_backward_query.wgsl")),
    ("naive_backward_scores.wgsl", include_str!("../shaders/naive_backward_scores.wgsl")),
    ("naive_output.wgsl", include_str!("../shaders/naive_output.wgsl")),
    ("naive_scores.wgsl", include_str!("../shaders/naive_scores.wgsl")),
    ("naive_softmax.wgsl", include_str!("../shaders/naive_softmax.wgsl")),
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
    /// The shader file and line (from 1) behind line `line` (from 1) of the text.
    pub fn origin(&self, line: usize) -> Option<(&'static str, usize)> {
        self.lines.get(line.checked_sub(1)?).copied()
    }
}

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
            let _ = writeln!(out.text, "{line}");
            out.lines.push((self.file, number + 1));
        }
        for (name, value) in &self.constants {
            // Writing to a String cannot fail.
            let _ = writeln!(out.text, "const {name} = {value}u;");
            out.lines.push((self.file, 0));
        }
        self.expand(files, self.file, &[], &mut vec![], &mut out)?;
        Ok(out)
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
                    out.text.push_str(&line);
                    out.text.push('\n');
                    out.lines.push((path, number));
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

/// The modules of the backward pass with these tiles of keys and of queries or, without them, of the naive one.
pub fn backward_modules(problem: &Problem, tiles: Option<[BackwardTile; 2]>) -> Vec<Specialization> {
    let mut passes = vec![backward_delta::pass(problem)];
    passes.extend(match tiles {
        Some([dkdv, dq]) => backward_tile::passes(problem, dkdv, dq),
        None => backward_naive::passes(problem),
    });
    passes.into_iter().map(|pass| pass.specialization).collect()
}

/// The modules of the tile kernel with this tile or, without one, of the naive kernel: what a plan compiles for a
/// problem, without a device.
pub fn modules(problem: &Problem, tile: Option<Tile>) -> Vec<Specialization> {
    let passes = match tile {
        Some(tile) => vec![forward_tile::pass(problem, tile)],
        None => naive::passes(problem),
    };
    passes.into_iter().map(|pass| pass.specialization).collect()
}

/// The modules of the backward pass on cooperative matrices, and the bindings that they are made for.
#[doc(hidden)]
pub fn coop_backward_modules(
    problem: &Problem,
    tiles: [CoopBackwardTile; 2],
    format: MatrixFormat,
    layout: &MatrixLayout,
) -> Vec<(Specialization, Vec<u32>)> {
    let matrices = forward_coop::Matrices { format, layout: layout.clone() };
    let passes = backward_coop::passes(problem, tiles, &matrices);
    passes.into_iter().map(|pass| (pass.specialization.clone(), pass.binding_numbers())).collect()
}

/// The module of the cooperative-matrix kernel, and the bindings that it is made for.
#[doc(hidden)]
pub fn coop_module(
    problem: &Problem,
    tile: CoopTile,
    format: MatrixFormat,
    layout: &MatrixLayout,
) -> (Specialization, Vec<u32>) {
    let matrices = forward_coop::Matrices { format, layout: layout.clone() };
    let pass = kernel::coop_pass(problem, tile, &matrices);
    (pass.specialization.clone(), pass.binding_numbers())
}

/// The modules of the decode kernel with this tile and so many splits of the keys.
pub fn decode_modules(problem: &Problem, tile: DecodeTile, splits: u32) -> Vec<Specialization> {
    decode::passes(problem, tile, splits).into_iter().map(|pass| pass.specialization).collect()
}

/// The module of a merge.
pub fn merge_module(problem: &MergeProblem) -> Specialization {
    decode::merge(problem).specialization
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
        ] {
            let error = expand(&[("main", text)], &[]).unwrap_err();
            assert_eq!((error.line, error.what.as_str()), (line, what), "{text:?}");
            assert_eq!(error.file, "main");
        }
    }
}
