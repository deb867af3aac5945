//! The files of `src/` use each other in one direction. A file is a module; what `lib.rs` only passes on counts for the module that has it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

type Graph = BTreeMap<String, BTreeSet<String>>;

/// The text of each module without comments, by its path: `kernel::pass`, and `kernel` for `kernel/mod.rs`.
fn modules(folder: &Path, path: &str, all: &mut BTreeMap<String, String>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let file = entry.unwrap().path();
        let name = file.file_stem().unwrap().to_str().unwrap();
        let module = if path.is_empty() { name.to_string() } else { format!("{path}::{name}") };
        if file.is_dir() {
            modules(&file, &module, all);
        } else {
            let text = std::fs::read_to_string(&file).unwrap();
            let code: Vec<_> = text.lines().map(|line| line.split("//").next().unwrap_or("")).collect();
            all.insert(if name == "mod" { path.to_string() } else { module }, code.join("\n"));
        }
    }
}

/// The paths in a tree of imports: `a::{b, c::d as e}` are `a::b` and `a::c::d`.
fn leaves(tree: &str, before: &str, all: &mut Vec<String>) {
    let (mut depth, mut start) = (0, 0);
    let mut parts = vec![];
    for (at, c) in tree.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&tree[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&tree[start..]);
    for part in parts.into_iter().map(str::trim).filter(|part| !part.is_empty()) {
        match part.split_once('{') {
            Some((head, rest)) => leaves(rest.strip_suffix('}').unwrap_or(rest), &format!("{before}{head}"), all),
            None => all.push(format!("{before}{}", part.split(" as ").next().unwrap_or(part))),
        }
    }
}

/// What a text names that begins with `root::`, a path or a tree of them.
fn named(text: &str, root: &str) -> Vec<String> {
    let mut all = vec![];
    let root = format!("{root}::");
    for (at, _) in text.match_indices(&root) {
        if text[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == ':') {
            continue;
        }
        let rest = &text[at + root.len()..];
        let is_path = |c: char| c.is_alphanumeric() || "_:".contains(c);
        let path = &rest[..rest.find(|c| !is_path(c)).unwrap_or(rest.len())];
        let tree = match rest[path.len()..].starts_with('{') {
            true => &rest[..rest.find(';').unwrap_or(rest.len())],
            false => path,
        };
        leaves(tree, "", &mut all);
    }
    all
}

/// Which modules each module uses.
fn graph(all: &BTreeMap<String, String>) -> Graph {
    // What lib.rs passes on, and from where.
    let mut passed_on = BTreeMap::new();
    for statement in all["lib"].split("pub use ").skip(1) {
        let mut paths = vec![];
        leaves(statement.split(';').next().unwrap_or(""), "", &mut paths);
        passed_on.extend(paths.into_iter().filter_map(|path| {
            let (_, item) = path.rsplit_once("::")?;
            Some((item.to_string(), path.clone()))
        }));
    }
    let module_of = |path: &str| {
        let first = path.split("::").next().unwrap_or(path);
        let path = passed_on.get(first).map_or(path, String::as_str);
        let mut prefixes = vec![path];
        while let Some((shorter, _)) = prefixes[prefixes.len() - 1].rsplit_once("::") {
            prefixes.push(shorter);
        }
        prefixes.into_iter().find(|prefix| all.contains_key(*prefix)).map(str::to_string)
    };
    let of_module = |(module, text): (&String, &String)| {
        let parent = module.rsplit_once("::").map_or("", |(parent, _)| parent);
        let below = |base: &str, path: String| if base.is_empty() { path } else { format!("{base}::{path}") };
        let code = text.split("mod tests {").next().unwrap_or(text);
        let mut paths = named(text, "crate");
        paths.extend(named(code, "super").into_iter().map(|path| below(parent, path)));
        // Modules in the folder of this one, which it names without more ado.
        let children = all.keys().filter(|child| child.rsplit_once("::").is_some_and(|(parent, _)| parent == module));
        for child in children.filter_map(|child| child.rsplit("::").next()) {
            paths.extend(named(code, child).into_iter().map(|path| below(module, format!("{child}::{path}"))));
        }
        let used = paths.iter().filter_map(|path| module_of(path)).filter(|used| used != module);
        (module.clone(), used.collect())
    };
    all.iter().filter(|(module, _)| *module != "lib").map(of_module).collect()
}

/// A module that uses itself through others, as the way there and back.
fn circle(graph: &Graph) -> Option<Vec<String>> {
    fn visit(graph: &Graph, module: &String, way: &mut Vec<String>, done: &mut BTreeSet<String>) -> bool {
        if let Some(at) = way.iter().position(|seen| seen == module) {
            way.drain(..at);
            return true;
        }
        if !done.insert(module.clone()) {
            return false;
        }
        way.push(module.clone());
        if graph.get(module).into_iter().flatten().any(|used| visit(graph, used, way, done)) {
            return true;
        }
        way.pop();
        false
    }
    let mut done = BTreeSet::new();
    graph.keys().find_map(|module| {
        let mut way = vec![];
        visit(graph, module, &mut way, &mut done).then_some(way)
    })
}

/// The same for what lies directly in `src/`, each folder as one.
fn folders(graph: &Graph) -> Graph {
    let folder = |module: &String| module.split("::").next().unwrap_or(module).to_string();
    let mut all = Graph::new();
    for (module, used) in graph {
        let from = folder(module);
        let used = used.iter().map(folder).filter(|to| *to != from);
        all.entry(from.clone()).or_default().extend(used);
    }
    all
}

#[test]
fn imports_make_no_circle() {
    let mut all = BTreeMap::new();
    modules(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), "", &mut all);
    let graph = graph(&all);
    for (module, used) in
        [("plan", "recipe"), ("kernel::decode", "kernel::pass"), ("recipe::choose", "recipe::forward")]
    {
        // Through a re-export of mod.rs, too.
        let through = used.rsplit_once("::").map_or("", |(parent, _)| parent);
        assert!(graph[module].contains(used) || graph[module].contains(through), "{module}: {:?}", graph[module]);
    }
    assert_eq!(circle(&graph), None);
    assert_eq!(circle(&folders(&graph)), None);
}

#[test]
fn circles_are_found() {
    let texts = [
        ("lib", "mod a;\nmod b;\npub use b::B;"),
        ("a", "use crate::B;"),
        ("b", "use crate::c::{d::D, e::{E as F}};\npub struct B;"),
        ("c", ""),
        ("c::d", "use super::e;"),
        ("c::e", "fn f() { crate::a::g() }"),
    ];
    let all = texts.map(|(module, text)| (module.to_string(), text.to_string())).into();
    let found = graph(&all);
    assert_eq!(circle(&found), Some(["a", "b", "c::d", "c::e"].map(str::to_string).to_vec()));
    let mut found = found;
    found.insert("c::e".into(), BTreeSet::new());
    assert_eq!(circle(&found), None);
}
