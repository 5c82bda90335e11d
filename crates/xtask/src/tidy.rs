//! What no other tool checks of the tree's shape: lengths, module comments, machine paths, links.

use std::path::{Path, PathBuf};

use anyhow::Context;
use syn::spanned::Spanned;
use syn::visit::Visit;

use crate::links;
use crate::report::Finding;

/// No file of Rust is longer, in lines.
const FILE_LINES_MAX: usize = 1200;
/// 95 of 100 files are not longer, in lines.
const FILE_LINES_P95_MAX: usize = 800;
/// No function is longer, in lines from its name to its closing brace.
const FUNCTION_LINES_MAX: usize = 70;
/// No test is longer: one may tell the story of a VM from beginning to end.
const TEST_FUNCTION_LINES_MAX: usize = 140;
/// Functions that were longer when the rule came: none may grow, and none may join them. One a line:
/// path, name, lines.
const LONG_FUNCTIONS_PATH: &str = "crates/xtask/data/long-functions.txt";
/// Directories that hold nothing of the project's own.
const SKIPPED_DIRECTORIES: [&str; 5] = ["target", ".git", "corpus", "artifacts", "bench-results"];
/// Paths of somebody's machine; split so that this file does not hold them.
const MACHINE_PATHS: [&str; 4] = [
    concat!("/wo", "rk/"),
    concat!("/tmp", "/k/"),
    concat!("/root", "/.cargo"),
    concat!("/home/", "user/"),
];
/// Files that are read as text.
const TEXT_EXTENSIONS: [&str; 8] = ["rs", "md", "toml", "sh", "yml", "yaml", "json", ""];

/// Checks every file of the workspace.
pub(crate) fn check(root: &Path) -> anyhow::Result<Vec<Finding>> {
    let mut findings = Vec::new();
    let mut lengths = Vec::new();
    let mut functions = Vec::new();
    for path in files(root)? {
        let extension = path.extension().unwrap_or_default().to_string_lossy();
        if !TEXT_EXTENSIONS.contains(&&*extension) {
            continue;
        }
        // A file that is no text has no lines.
        let Ok(text) = std::fs::read_to_string(&path) else {
            continue;
        };
        let name = path
            .strip_prefix(root)
            .unwrap_or(&path)
            .display()
            .to_string();
        findings.extend(check_paths(&name, &text));
        match &*extension {
            "rs" => {
                lengths.push((text.lines().count(), name.clone()));
                findings.extend(check_rust(&name, &text));
                functions.extend(long_functions(&name, &text));
            }
            "md" => findings.extend(links::check(root, &name, &text)),
            _ => {}
        }
    }
    let known = std::fs::read_to_string(root.join(LONG_FUNCTIONS_PATH))
        .with_context(|| format!("cannot read {LONG_FUNCTIONS_PATH}"))?;
    findings.extend(check_functions(functions, &parse_known(&known)?));
    findings.extend(check_unsafe(root)?);
    findings.extend(check_spread(lengths));
    findings.sort();
    Ok(findings)
}

fn files(directory: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let entries = std::fs::read_dir(directory)
        .with_context(|| format!("cannot read {}", directory.display()))?;
    for entry in entries {
        let entry = entry?;
        let kind = entry.file_type()?;
        let name = entry.file_name();
        if kind.is_dir() && !SKIPPED_DIRECTORIES.iter().any(|skipped| name == *skipped) {
            files.extend(self::files(&entry.path())?);
        } else if kind.is_file() {
            files.push(entry.path());
        }
    }
    Ok(files)
}

fn check_paths(name: &str, text: &str) -> Vec<Finding> {
    text.lines()
        .enumerate()
        .filter_map(|(index, line)| {
            let path = MACHINE_PATHS.iter().find(|path| line.contains(*path))?;
            let message = format!("'{path}' is a path of somebody's machine");
            Some(Finding::new(name, index + 1, message))
        })
        .collect()
}

fn check_rust(name: &str, text: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    let length = text.lines().count();
    if length > FILE_LINES_MAX {
        let message = format!("{length} lines: divide it, {FILE_LINES_MAX} are the most");
        findings.push(Finding::new(name, length, message));
    }
    if !text.starts_with("//!") {
        let message = "the file does not open with '//!' saying what lives here";
        findings.push(Finding::new(name, 1, message));
    }
    findings
}

/// A function that is longer than the rule allows.
#[derive(Debug, Clone, PartialEq, Eq)]
struct LongFunction {
    path: String,
    line: usize,
    name: String,
    lines: usize,
}

fn function_lines_max(path: &str) -> usize {
    if path.contains("/tests/") || path.ends_with("_tests.rs") {
        TEST_FUNCTION_LINES_MAX
    } else {
        FUNCTION_LINES_MAX
    }
}

/// None in a file that is no Rust: rustc tells more about that.
fn long_functions(path: &str, text: &str) -> Vec<LongFunction> {
    let mut visitor = FunctionLengths {
        path,
        lines_max: function_lines_max(path),
        found: Vec::new(),
    };
    if let Ok(file) = syn::parse_file(text) {
        visitor.visit_file(&file);
    }
    visitor.found
}

/// Collects functions that are too long.
struct FunctionLengths<'a> {
    path: &'a str,
    lines_max: usize,
    found: Vec<LongFunction>,
}

impl FunctionLengths<'_> {
    fn check(&mut self, signature: &syn::Signature, body: &syn::Block) {
        let line = signature.span().start().line;
        let lines = body.span().end().line + 1 - line;
        if lines > self.lines_max {
            self.found.push(LongFunction {
                path: self.path.to_owned(),
                line,
                name: signature.ident.to_string(),
                lines,
            });
        }
    }
}

impl<'ast> Visit<'ast> for FunctionLengths<'_> {
    fn visit_item_fn(&mut self, item: &'ast syn::ItemFn) {
        self.check(&item.sig, &item.block);
        syn::visit::visit_item_fn(self, item);
    }

    fn visit_impl_item_fn(&mut self, item: &'ast syn::ImplItemFn) {
        self.check(&item.sig, &item.block);
        syn::visit::visit_impl_item_fn(self, item);
    }
}

fn parse_known(text: &str) -> anyhow::Result<Vec<LongFunction>> {
    text.lines()
        .enumerate()
        .filter(|(_, line)| !line.is_empty() && !line.starts_with('#'))
        .map(|(index, line)| {
            let mut words = line.split_whitespace();
            let (Some(path), Some(name), Some(Ok(lines)), None) = (
                words.next(),
                words.next(),
                words.next().map(str::parse),
                words.next(),
            ) else {
                anyhow::bail!("{LONG_FUNCTIONS_PATH}:{}: not 'path name lines'", index + 1);
            };
            Ok(LongFunction {
                path: path.to_owned(),
                line: index + 1,
                name: name.to_owned(),
                lines,
            })
        })
        .collect()
}

/// The ratchet: lengths may only shrink, and an entry goes when it has done its duty.
fn check_functions(found: Vec<LongFunction>, known: &[LongFunction]) -> Vec<Finding> {
    let same = |a: &LongFunction, b: &LongFunction| a.path == b.path && a.name == b.name;
    let stale = known
        .iter()
        .filter(|entry| !found.iter().any(|function| same(entry, function)))
        .map(|entry| {
            let message = format!("{} is not too long any more: remove the entry", entry.name);
            Finding::new(LONG_FUNCTIONS_PATH, entry.line, message)
        });
    let mut findings: Vec<Finding> = stale.collect();
    for function in &found {
        let entry = known.iter().find(|entry| same(entry, function));
        let lines_max = entry.map_or(function_lines_max(&function.path), |entry| entry.lines);
        if function.lines > lines_max {
            let message = format!(
                "the function {} has {} lines, {lines_max} are the most",
                function.name, function.lines
            );
            findings.push(Finding::new(&*function.path, function.line, message));
        }
    }
    findings
}

fn check_spread(mut lengths: Vec<(usize, String)>) -> Option<Finding> {
    lengths.sort();
    let (length, name) = lengths.get(lengths.len().saturating_sub(1) * 95 / 100)?;
    (*length > FILE_LINES_P95_MAX).then(|| {
        let message =
            format!("{length} lines: more than 5 of 100 files have more than {FILE_LINES_P95_MAX}");
        Finding::new(name, *length, message)
    })
}

/// A crate without unsafe code forbids it, so that the first line of it is a decision.
fn check_unsafe(root: &Path) -> anyhow::Result<Vec<Finding>> {
    let mut findings = Vec::new();
    for entry in std::fs::read_dir(root.join("crates"))? {
        let source = entry?.path().join("src");
        let roots = ["lib.rs", "main.rs"].map(|name| source.join(name));
        for crate_root in roots.iter().filter(|path| path.is_file()) {
            let mut uses = false;
            for file in files(&source)? {
                uses |= uses_unsafe(&std::fs::read_to_string(file)?);
            }
            let forbids = std::fs::read_to_string(crate_root)?.contains("#![forbid(unsafe_code)]");
            if !uses && !forbids {
                let name = crate_root.strip_prefix(root).unwrap_or(crate_root);
                let message = "the crate has no unsafe code: say #![forbid(unsafe_code)]";
                findings.push(Finding::new(name.display().to_string(), 1, message));
            }
        }
    }
    Ok(findings)
}

fn uses_unsafe(text: &str) -> bool {
    [
        "unsafe {",
        "unsafe fn",
        "unsafe impl",
        "unsafe extern",
        "unsafe(",
        "extern \"C\"",
    ]
    .iter()
    .any(|use_of_it| text.contains(use_of_it))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages(text: &str) -> Vec<String> {
        check_rust("a.rs", text)
            .iter()
            .map(ToString::to_string)
            .collect()
    }

    #[test]
    fn a_tidy_file_passes() {
        assert!(messages("//! What.\n\nfn short() {\n}\n").is_empty());
    }

    #[test]
    fn long_functions_are_found_also_in_implementations_and_modules() {
        let body = "    call();\n".repeat(FUNCTION_LINES_MAX);
        let text = format!(
            "//! What.\nfn long() {{\n{body}}}\nimpl X {{\nfn longer() {{\n{body}}}\n}}\n\
             mod tests {{\nfn longest() {{\n{body}}}\n}}\n"
        );
        let found = check_functions(long_functions("a.rs", &text), &[]);
        assert_eq!(found.len(), 3, "{found:?}");
        let first = found[0].to_string();
        assert!(
            first.starts_with("a.rs:2: the function long has 72 lines"),
            "{first}"
        );
        let fits = "    call();\n".repeat(FUNCTION_LINES_MAX - 2);
        let text = format!("//! What.\nfn fits() {{\n{fits}}}\n");
        assert_eq!(long_functions("a.rs", &text), []);
    }

    #[test]
    fn tests_may_be_longer() {
        let body = "    call();\n".repeat(FUNCTION_LINES_MAX);
        let text = format!("//! What.\nfn long() {{\n{body}}}\n");
        assert_eq!(long_functions("crates/a/tests/b.rs", &text), []);
        assert_eq!(long_functions("crates/a/src/b.rs", &text).len(), 1);
    }

    #[test]
    fn known_long_functions_may_only_shrink() {
        let body = "    call();\n".repeat(FUNCTION_LINES_MAX);
        let found = long_functions("a.rs", &format!("fn long() {{\n{body}}}\n"));
        let check = |known: &str| check_functions(found.clone(), &parse_known(known).unwrap());
        assert_eq!(check("# comment\n\na.rs long 72\n"), []);
        assert_eq!(check("a.rs long 71\n").len(), 1);
        assert_eq!(check("a.rs long 72\na.rs gone 90\n").len(), 1);
        assert!(parse_known("a.rs long\n").is_err());
    }

    #[test]
    fn files_without_comment_and_long_files_are_found() {
        assert_eq!(messages("fn a() {}\n").len(), 1);
        let long = format!("//! What.\n{}", "\n".repeat(FILE_LINES_MAX));
        assert_eq!(messages(&long).len(), 1);
    }

    #[test]
    fn paths_of_a_machine_are_found() {
        let text = format!("fine\nsee {}x\n", MACHINE_PATHS[0]);
        assert_eq!(check_paths("a.md", &text)[0].line, 2);
        assert!(check_paths("a.md", "/usr/lib\n").is_empty());
    }

    #[test]
    fn the_spread_of_lengths_is_checked() {
        let files = |long: usize| {
            let lengths = std::iter::repeat_n(FILE_LINES_P95_MAX + 1, long)
                .chain(std::iter::repeat_n(10, 100 - long));
            lengths.map(|length| (length, "a.rs".to_owned())).collect()
        };
        assert_eq!(check_spread(files(5)), None);
        assert!(check_spread(files(6)).is_some());
    }

    #[test]
    fn crates_without_unsafe_have_to_forbid_it() {
        let directory = tempfile::tempdir().unwrap();
        let source = directory.path().join("crates/a/src");
        std::fs::create_dir_all(&source).unwrap();
        let found = |text: &str| {
            std::fs::write(source.join("lib.rs"), text).unwrap();
            check_unsafe(directory.path()).unwrap().len()
        };
        assert_eq!(found("//! A.\n"), 1);
        assert_eq!(found("//! A.\n#![forbid(unsafe_code)]\n"), 0);
        assert_eq!(found("//! A.\nfn a() { unsafe { b() } }\n"), 0);
    }
}
