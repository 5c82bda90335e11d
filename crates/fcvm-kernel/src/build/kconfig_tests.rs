//! Tests of [`super`] on small Kconfig texts.

use proptest::prelude::*;

use super::*;

const TEXT: &str = "\
config NET
\tbool \"Networking\"
\thelp
\t  config HELP is text
\t  depends on NOTHING

if NET
menu \"Filters\"
\tdepends on FILTERS && !(OLD || \"$(X)\" = \"y\")
config NFT
\ttristate \"nft\" if EXPERT
\tdepends on IPV6 || \\
\t\tINET
\tselect LIB
endmenu
endif

config LIB
\tbool
choice
\tprompt \"tick\"
config HZ_100
\tbool \"100\"
config HZ_250
\tbool \"250\"
endchoice
";

fn config(symbols: &[(&str, &str)]) -> BTreeMap<String, String> {
    symbols
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect()
}

#[test]
fn the_reason_of_a_loss_is_told() {
    let tree = Tree::parse(TEXT);
    assert!(!tree.has("HELP"));
    let why = |symbol: &str, symbols: &[(&str, &str)]| tree.explain(symbol, "y", &config(symbols));
    assert_eq!(
        why("NFT", &[]),
        "it depends on NET and FILTERS and IPV6 || INET"
    );
    let on = [("NET", "y"), ("FILTERS", "y"), ("INET", "y")];
    assert_eq!(why("NFT", &on), "its prompt depends on EXPERT");
    assert_eq!(why("LIB", &on), "it has no prompt: NFT would select it");
    assert_eq!(
        why("HZ_100", &[("HZ_250", "y")]),
        "HZ_250 is chosen in its place"
    );
    assert!(why("NOWHERE", &[]).contains("no such symbol"));
    assert!(why("NFTT", &[]).contains("it has NFT"));
    let selected = tree.explain("LIB", "n", &config(&[("NFT", "y")]));
    assert_eq!(selected, "it is selected by NFT");
}

#[test]
fn expressions_are_evaluated() {
    let config = config(&[("A", "y"), ("N", "12"), ("S", "\"text\""), ("M", "m")]);
    for (text, expected) in [
        ("A", true),
        ("!A", false),
        ("A && B", false),
        ("A || B", true),
        ("!(A && B) && M", true),
        ("N > 9", true),
        ("N < 9", false),
        ("S = \"text\"", true),
        ("B != n", false),
        ("A!=y", false),
        ("$(success,true)", true),
    ] {
        assert_eq!(Evaluator::new(text, &config).holds(), expected, "{text}");
    }
}

proptest! {
    #[test]
    fn no_text_makes_it_panic(text in "(config|if|menu|choice|depends on|endif|help|select|[A-Z!&|()=\"\\\\ \t\n]){0,60}") {
        let tree = Tree::parse(&text);
        let _ = tree.explain("A", "y", &BTreeMap::new());
        let _ = unmet(std::slice::from_ref(&text), &BTreeMap::new());
    }
}
