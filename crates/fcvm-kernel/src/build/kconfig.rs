//! A reader of Kconfig files, as far as it takes to say why a symbol was lost.
//!
//! The kernel's own `conf` decides what becomes of a configuration (`resolve`). This one finds where
//! symbols are defined, on what they depend, and who selects them (Documentation/kbuild/
//! kconfig-language.rst). Macros are taken for true: an explanation may be missing, never a verdict.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::Result;
use crate::files;

/// Largest Kconfig file.
const FILE_MAX_BYTES: usize = 1 << 20;
/// Most files: the kernel has 1,900.
const FILE_COUNT_MAX: usize = 20_000;
/// Files sourced in one another.
const DEPTH_MAX: usize = 64;

/// Where and how a symbol is defined.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Definition {
    /// Expressions that all have to hold: the symbol's own and those around it.
    pub(crate) depends: Vec<String>,
    /// The condition of its prompt: empty where it has none; none where it cannot be chosen at all.
    pub(crate) prompt: Option<String>,
    /// Number of the choice it is in.
    pub(crate) choice: Option<usize>,
}

/// All symbols of a source.
#[derive(Debug, Default)]
pub(crate) struct Tree {
    symbols: BTreeMap<String, Vec<Definition>>,
    /// Symbol, then who selects it.
    selected_by: BTreeMap<String, BTreeSet<String>>,
}

/// What surrounds the line that is being read.
#[derive(Debug, Clone)]
enum Block {
    If(String),
    Menu(Vec<String>),
    Choice(usize, Vec<String>),
}

/// What the next attribute belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Current {
    Nothing,
    Symbol(String),
    Block,
}

struct Reader<'a> {
    root: &'a Path,
    architecture: &'a str,
    tree: Tree,
    blocks: Vec<Block>,
    file_count: usize,
    choice_count: usize,
}

impl Tree {
    /// Reads `Kconfig` of a source and all that it sources.
    pub(crate) fn read(root: &Path, architecture: &str) -> Result<Self> {
        let mut reader = Reader {
            root,
            architecture,
            tree: Self::default(),
            blocks: Vec::new(),
            file_count: 0,
            choice_count: 0,
        };
        reader.file("Kconfig", 0)?;
        Ok(reader.tree)
    }

    #[cfg(test)]
    pub(crate) fn parse(text: &str) -> Self {
        let mut reader = Reader {
            root: Path::new("/nonexistent"),
            architecture: "x86",
            tree: Self::default(),
            blocks: Vec::new(),
            file_count: 0,
            choice_count: 0,
        };
        // Without source lines nothing can fail.
        let _ = reader.text(text, DEPTH_MAX);
        reader.tree
    }

    pub(crate) fn has(&self, symbol: &str) -> bool {
        self.symbols.contains_key(symbol)
    }

    /// Number of symbols.
    pub(crate) fn symbol_count(&self) -> usize {
        self.symbols.len()
    }

    /// Why `symbol` is not `wanted` in `config`, as one clause.
    pub(crate) fn explain(
        &self,
        symbol: &str,
        wanted: &str,
        config: &BTreeMap<String, String>,
    ) -> String {
        let Some(definitions) = self.symbols.get(symbol) else {
            return self.unknown(symbol);
        };
        let selectors = || {
            self.selected_by
                .get(symbol)
                .into_iter()
                .flatten()
                .filter(|name| is_on(config, name))
                .cloned()
                .collect::<Vec<_>>()
        };
        if wanted == "n" {
            let selectors = selectors();
            return match selectors.is_empty() {
                false => format!("it is selected by {}", selectors.join(", ")),
                true => "it has no prompt and is on by default".to_owned(),
            };
        }
        let unmet = definitions
            .iter()
            .map(|definition| unmet(&definition.depends, config))
            .min_by_key(Vec::len)
            .unwrap_or_default();
        if !unmet.is_empty() {
            return format!("it depends on {}", unmet.join(" and "));
        }
        if let Some(other) = self.chosen_instead(symbol, definitions, config) {
            return format!("{other} is chosen in its place");
        }
        let prompt = definitions
            .iter()
            .find_map(|definition| definition.prompt.clone());
        match prompt {
            None => match self.selected_by.get(symbol) {
                Some(names) => format!(
                    "it has no prompt: {} would select it",
                    first_names(names.iter())
                ),
                None => "it has no prompt, so it follows from others".to_owned(),
            },
            Some(condition) => {
                let unmet = self::unmet(&[condition], config);
                match unmet.is_empty() {
                    false => format!("its prompt depends on {}", unmet.join(" and ")),
                    true => "the value is outside of what its Kconfig allows".to_owned(),
                }
            }
        }
    }

    /// What to say of a name that no Kconfig file has.
    fn unknown(&self, symbol: &str) -> String {
        if let Some(name) = super::profile::new_name(symbol).filter(|name| self.has(name)) {
            return format!("it is called {name} in this source");
        }
        // A prefix or suffix is what a rename most often is.
        let similar = self
            .symbols
            .keys()
            .filter(|name| name.ends_with(&format!("_{symbol}")) || distance_is_one(name, symbol));
        let names = first_names(similar);
        match names.is_empty() {
            true => "this source has no such symbol".to_owned(),
            false => format!("this source has no such symbol; it has {names}"),
        }
    }

    fn chosen_instead(
        &self,
        symbol: &str,
        definitions: &[Definition],
        config: &BTreeMap<String, String>,
    ) -> Option<&str> {
        let choice = definitions
            .iter()
            .find_map(|definition| definition.choice)?;
        self.symbols
            .iter()
            .find(|(name, others)| {
                name.as_str() != symbol
                    && is_on(config, name)
                    && others.iter().any(|other| other.choice == Some(choice))
            })
            .map(|(name, _)| name.as_str())
    }
}

impl Reader<'_> {
    fn file(&mut self, path: &str, depth: usize) -> Result<()> {
        let path = path
            .replace("$(SRCARCH)", self.architecture)
            .replace("$SRCARCH", self.architecture)
            .replace("$(srctree)/", "");
        let full: PathBuf = self.root.join(&path);
        self.file_count += 1;
        // A path with other variables, or one that is not there, is not of this architecture.
        if path.contains('$') || depth > DEPTH_MAX || self.file_count > FILE_COUNT_MAX {
            return Ok(());
        }
        if depth > 0 && !full.is_file() {
            return Ok(());
        }
        let bytes = files::read_bounded(&full, FILE_MAX_BYTES)?;
        let blocks = self.blocks.len();
        self.text(&String::from_utf8_lossy(&bytes), depth)?;
        // What a file opens it closes; one that does not must not reach into the next.
        self.blocks.truncate(blocks);
        Ok(())
    }

    fn text(&mut self, text: &str, depth: usize) -> Result<()> {
        let joined = text.replace("\\\n", " ");
        let mut current = Current::Nothing;
        let mut help: Option<Option<usize>> = None;
        for line in joined.lines() {
            let trimmed = line.trim();
            if let Some(indent) = &mut help {
                if trimmed.is_empty() {
                    continue;
                }
                let here = width(line);
                match *indent {
                    None if here > 0 => {
                        *indent = Some(here);
                        continue;
                    }
                    Some(first) if here >= first => continue,
                    _ => help = None,
                }
            }
            if trimmed.is_empty() || trimmed.starts_with('#') {
                continue;
            }
            let (word, rest) = trimmed
                .split_once(char::is_whitespace)
                .map_or((trimmed, ""), |(word, rest)| (word, rest.trim()));
            match word {
                "help" | "---help---" => help = Some(None),
                "source" => self.file(rest.trim_matches('"'), depth + 1)?,
                _ => current = self.line(word, rest, current),
            }
        }
        Ok(())
    }

    fn line(&mut self, word: &str, rest: &str, current: Current) -> Current {
        match word {
            "config" | "menuconfig" => {
                let definition = Definition {
                    depends: self.around(),
                    prompt: None,
                    choice: self.blocks.iter().rev().find_map(|block| match block {
                        Block::Choice(number, _) => Some(*number),
                        _ => None,
                    }),
                };
                let name = rest.to_owned();
                self.tree
                    .symbols
                    .entry(name.clone())
                    .or_default()
                    .push(definition);
                return Current::Symbol(name);
            }
            "if" => self.blocks.push(Block::If(rest.to_owned())),
            "menu" => {
                self.blocks.push(Block::Menu(Vec::new()));
                return Current::Block;
            }
            "choice" => {
                self.choice_count += 1;
                self.blocks
                    .push(Block::Choice(self.choice_count, Vec::new()));
                return Current::Block;
            }
            "endif" | "endmenu" | "endchoice" => drop(self.blocks.pop()),
            "comment" => {}
            _ => {
                self.attribute(word, rest, &current);
                return current;
            }
        }
        Current::Nothing
    }

    /// Conditions of the blocks around.
    fn around(&self) -> Vec<String> {
        let conditions = |block: &Block| match block {
            Block::If(condition) => vec![condition.clone()],
            Block::Menu(depends) | Block::Choice(_, depends) => depends.clone(),
        };
        self.blocks.iter().flat_map(conditions).collect()
    }

    fn attribute(&mut self, word: &str, rest: &str, current: &Current) {
        let depends = (word == "depends")
            .then(|| rest.strip_prefix("on"))
            .flatten()
            .map(|expression| expression.trim().to_owned());
        let symbol = match current {
            Current::Symbol(name) => name,
            Current::Block => {
                if let (Some(Block::Menu(list) | Block::Choice(_, list)), Some(expression)) =
                    (self.blocks.last_mut(), depends)
                {
                    list.push(expression);
                }
                return;
            }
            Current::Nothing => return,
        };
        if word == "select" {
            let target = rest.split_whitespace().next().unwrap_or_default();
            let selectors = self.tree.selected_by.entry(target.to_owned()).or_default();
            selectors.insert(symbol.clone());
            return;
        }
        let Some(definition) = self
            .tree
            .symbols
            .get_mut(symbol)
            .and_then(|definitions| definitions.last_mut())
        else {
            return;
        };
        if let Some(expression) = depends {
            definition.depends.push(expression);
        } else if matches!(
            word,
            "bool" | "tristate" | "string" | "int" | "hex" | "prompt"
        ) && rest.starts_with(['"', '\''])
        {
            let condition = rest
                .rsplit_once(" if ")
                .filter(|(text, _)| text.trim_end().ends_with(['"', '\'']))
                .map_or("", |(_, condition)| condition);
            definition.prompt = Some(condition.to_owned());
        }
    }
}

fn width(line: &str) -> usize {
    let mut width = 0;
    for c in line.chars() {
        match c {
            ' ' => width += 1,
            '\t' => width = (width / 8 + 1) * 8,
            _ => break,
        }
    }
    width
}

fn is_on(config: &BTreeMap<String, String>, symbol: &str) -> bool {
    config
        .get(symbol)
        .is_some_and(|value| value == "y" || value == "m")
}

/// A few names out of many.
fn first_names<'a>(names: impl Iterator<Item = &'a String>) -> String {
    let names: Vec<&str> = names.take(4).map(String::as_str).collect();
    names.join(", ")
}

/// One letter more, less or other.
fn distance_is_one(one: &str, other: &str) -> bool {
    let (one, other) = (one.as_bytes(), other.as_bytes());
    if one.len().abs_diff(other.len()) > 1 {
        return false;
    }
    let prefix = one.iter().zip(other).take_while(|(a, b)| a == b).count();
    let rest = |bytes: &[u8]| bytes.len() - prefix;
    let suffix = one
        .iter()
        .rev()
        .zip(other.iter().rev())
        .take_while(|(a, b)| a == b)
        .count();
    rest(one).saturating_sub(suffix) <= 1 && rest(other).saturating_sub(suffix) <= 1
}

/// The parts of all expressions' conjunctions that do not hold.
fn unmet(expressions: &[String], config: &BTreeMap<String, String>) -> Vec<String> {
    let mut parts = Vec::new();
    for expression in expressions {
        for part in conjuncts(expression) {
            let shown = part.split_whitespace().collect::<Vec<_>>().join(" ");
            if !Evaluator::new(part, config).holds() && !parts.contains(&shown) {
                parts.push(shown);
            }
        }
    }
    parts
}

/// Splits at `&&` outside of parentheses and quotation marks.
fn conjuncts(expression: &str) -> Vec<&str> {
    let bytes = expression.as_bytes();
    let (mut depth, mut quoted, mut start) = (0_i32, false, 0);
    let mut parts = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        match bytes[at] {
            b'"' => quoted = !quoted,
            b'(' if !quoted => depth += 1,
            b')' if !quoted => depth -= 1,
            b'|' if !quoted && depth == 0 => return vec![expression.trim()],
            b'&' if !quoted && depth == 0 && bytes.get(at + 1) == Some(&b'&') => {
                parts.push(expression[start..at].trim());
                at += 1;
                start = at + 1;
            }
            _ => {}
        }
        at += 1;
    }
    parts.push(expression[start..].trim());
    parts.retain(|part| !part.is_empty());
    parts
}

/// Evaluates an expression; m counts as y, and what it does not understand as y too.
struct Evaluator<'a> {
    rest: &'a str,
    config: &'a BTreeMap<String, String>,
    depth: usize,
}

impl<'a> Evaluator<'a> {
    fn new(text: &'a str, config: &'a BTreeMap<String, String>) -> Self {
        Self {
            rest: text,
            config,
            depth: 0,
        }
    }

    fn holds(&mut self) -> bool {
        // What follows a condition, such as a comment, is not looked at.
        self.either().unwrap_or(true)
    }

    fn take(&mut self, token: &str) -> bool {
        self.rest = self.rest.trim_start();
        match self.rest.strip_prefix(token) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    fn either(&mut self) -> Option<bool> {
        let mut value = self.both()?;
        while self.take("||") {
            value |= self.both()?;
        }
        Some(value)
    }

    fn both(&mut self) -> Option<bool> {
        let mut value = self.one()?;
        while self.take("&&") {
            value &= self.one()?;
        }
        Some(value)
    }

    fn one(&mut self) -> Option<bool> {
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            return None;
        }
        let value = self.one_inner();
        self.depth -= 1;
        value
    }

    fn one_inner(&mut self) -> Option<bool> {
        self.rest = self.rest.trim_start();
        if !self.rest.starts_with("!=") && self.take("!") {
            return self.one().map(|value| !value);
        }
        if self.take("(") {
            let value = self.either()?;
            return self.take(")").then_some(value);
        }
        let left = self.operand()?;
        for operator in ["!=", "<=", ">=", "=", "<", ">"] {
            if self.take(operator) {
                let right = self.operand()?;
                return Some(compare(&left, operator, &right));
            }
        }
        Some(left == "y" || left == "m")
    }

    /// The value of a symbol or a constant; none for a macro.
    fn operand(&mut self) -> Option<String> {
        self.rest = self.rest.trim_start();
        if self.take("\"") {
            let (text, rest) = self.rest.split_once('"')?;
            self.rest = rest;
            return (!text.contains('$')).then(|| text.to_owned());
        }
        let end = self
            .rest
            .find(|c: char| !c.is_ascii_alphanumeric() && c != '_' && c != '-' && c != '.')
            .unwrap_or(self.rest.len());
        if end == 0 {
            return None;
        }
        let (word, rest) = self.rest.split_at(end);
        self.rest = rest;
        let is_constant = matches!(word, "y" | "m" | "n")
            || word.starts_with(|c: char| {
                c.is_ascii_digit() && !word.contains(|c: char| c.is_ascii_uppercase())
            });
        if is_constant {
            return Some(word.to_owned());
        }
        let value = self.config.get(word).map_or("n", String::as_str);
        Some(value.trim_matches('"').to_owned())
    }
}

fn compare(left: &str, operator: &str, right: &str) -> bool {
    let order = match (number(left), number(right)) {
        (Some(left), Some(right)) => left.cmp(&right),
        _ => left.cmp(right),
    };
    match operator {
        "=" => order.is_eq(),
        "!=" => order.is_ne(),
        "<" => order.is_lt(),
        "<=" => order.is_le(),
        ">" => order.is_gt(),
        _ => order.is_ge(),
    }
}

/// A number; `n` is what a number's symbol that is not set counts as.
fn number(text: &str) -> Option<i64> {
    match text.strip_prefix("0x") {
        Some(digits) => i64::from_str_radix(digits, 16).ok(),
        None if text == "n" => Some(0),
        None => text.parse().ok(),
    }
}

#[cfg(test)]
#[path = "kconfig_tests.rs"]
mod tests;
