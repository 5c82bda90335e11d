//! Links in Markdown files: what a relative one points to has to exist, with its heading.

use std::path::Path;

use crate::report::Finding;

/// Checks the links in one file. `path` is below `root`.
pub(crate) fn check(root: &Path, path: &str, text: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (number, line) in lines_outside_code(text) {
        for target in targets(line) {
            if let Some(message) = refusal(root, path, text, target) {
                findings.push(Finding::new(path, number, message));
            }
        }
    }
    findings
}

/// Lines with their numbers from 1, without fenced code.
fn lines_outside_code(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut in_code = false;
    text.lines().enumerate().filter_map(move |(index, line)| {
        let fence = line.trim_start().starts_with("```");
        in_code ^= fence;
        (!in_code && !fence).then_some((index + 1, line))
    })
}

/// The targets of `[text](target)`.
fn targets(line: &str) -> impl Iterator<Item = &str> {
    line.split("](")
        .skip(1)
        .filter_map(|rest| rest.split_once(')'))
        .map(|(target, _)| target.split(' ').next().unwrap_or(target))
}

fn refusal(root: &Path, path: &str, text: &str, target: &str) -> Option<String> {
    if target.contains("://") || target.starts_with("mailto:") {
        return None;
    }
    let (file, fragment) = target.split_once('#').unwrap_or((target, ""));
    let linked;
    let linked_text = if file.is_empty() {
        text
    } else {
        let directory = Path::new(path).parent().unwrap_or(Path::new(""));
        let linked_path = root.join(directory).join(file);
        if !linked_path.exists() {
            return Some(format!("the link to {target} leads nowhere"));
        }
        linked = std::fs::read_to_string(&linked_path).unwrap_or_default();
        &linked
    };
    let found = fragment.is_empty()
        || lines_outside_code(linked_text)
            .filter_map(|(_, line)| line.strip_prefix('#'))
            .any(|heading| anchor(heading) == fragment);
    (!found).then(|| format!("the link to {target} names a heading that is not there"))
}

/// The anchor that GitHub gives a heading.
fn anchor(heading: &str) -> String {
    heading
        .trim_start_matches('#')
        .trim()
        .to_lowercase()
        .chars()
        .filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'))
        .map(|c| if c == ' ' { '-' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_that_lead_nowhere_are_found() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("docs")).unwrap();
        std::fs::write(directory.path().join("README.md"), "# Two words, here!\n").unwrap();
        let text = "# Own\n[a](../README.md) [b](../README.md#two-words-here) [c](#own)\n\
            [d](https://registry.example/x)\n```\n[e](nowhere)\n```\n\
            [f](gone.md) and [g](../README.md#gone)\n[h](#gone)\n";
        let findings = check(directory.path(), "docs/a.md", text);
        let lines: Vec<usize> = findings.iter().map(|finding| finding.line).collect();
        assert_eq!(lines, [7, 7, 8], "{findings:?}");
    }
}
