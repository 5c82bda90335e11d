//! Forms of output: tables, times, ages.

use std::io::Write;

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Prints a table without borders, columns three spaces apart, as Podman does.
pub(crate) fn table(columns: &[&str], rows: impl Iterator<Item = Vec<String>>) {
    let mut table = comfy_table::Table::new();
    table
        .load_preset(comfy_table::presets::NOTHING)
        .set_header(columns.iter().copied());
    for row in rows {
        table.add_row(row);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    let mut stdout = std::io::stdout().lock();
    for line in table.lines() {
        // A reader that left (`| head`) is no failure.
        let _ = writeln!(stdout, "{}", line.trim_end());
    }
}

/// A time in RFC 3339.
pub(crate) fn timestamp(time: OffsetDateTime) -> String {
    time.format(&Rfc3339).unwrap_or_default()
}

/// The time since then, as Podman words it: `5 minutes`.
pub(crate) fn age(since: OffsetDateTime) -> String {
    let seconds = (OffsetDateTime::now_utc() - since).whole_seconds().max(0);
    let (count, unit) = match seconds {
        0 => return "less than a second".to_owned(),
        1..=59 => (seconds, "second"),
        60..=3599 => (seconds / 60, "minute"),
        3600..=86_399 => (seconds / 3600, "hour"),
        86_400..=1_209_599 => (seconds / 86_400, "day"),
        1_209_600..=5_183_999 => (seconds / 604_800, "week"),
        _ => (seconds / 2_592_000, "month"),
    };
    format!("{count} {unit}{}", if count == 1 { "" } else { "s" })
}

/// The beginning of a text, with an ellipsis where something is missing.
pub(crate) fn shorten(text: &str, max_chars: usize) -> String {
    let text = crate::errors::printable(text);
    if text.chars().count() <= max_chars {
        return text;
    }
    let beginning: String = text.chars().take(max_chars.saturating_sub(3)).collect();
    beginning + "..."
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_in_the_largest_fitting_unit() {
        let ago = |seconds| age(OffsetDateTime::now_utc() - time::Duration::seconds(seconds));
        assert_eq!(ago(0), "less than a second");
        assert_eq!(ago(1), "1 second");
        assert_eq!(ago(150), "2 minutes");
        assert_eq!(ago(7200), "2 hours");
        assert_eq!(ago(3 * 86_400), "3 days");
        assert_eq!(ago(-5), "less than a second");
    }

    #[test]
    fn long_texts_are_cut_between_characters() {
        assert_eq!(shorten("äöüäöü", 6), "äöüäöü");
        assert_eq!(shorten("äöüäöüä", 6), "äöü...");
    }
}
