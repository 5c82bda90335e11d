//! Member paths: what is refused, what is a whiteout, and the components of the rest.

use super::error::Refusal;

/// Longest name of a directory entry, as Linux and EROFS have it.
pub(crate) const MAX_NAME_BYTES: usize = 255;

const WHITEOUT_PREFIX: &[u8] = b".wh.";
const RESERVED_PREFIX: &[u8] = b".wh..wh.";
const OPAQUE_NAME: &[u8] = b".wh..wh..opq";

/// What a member path asks for. Paths are relative to the root of the image.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum MemberPath<'a> {
    /// The root directory itself (`.`, `./`).
    Root,
    /// An entry called `name` in `parent`.
    Entry {
        parent: Vec<&'a [u8]>,
        name: &'a [u8],
    },
    /// Removes what lower layers hold under `name` in `parent` (`.wh.NAME`).
    Whiteout {
        parent: Vec<&'a [u8]>,
        name: &'a [u8],
    },
    /// Removes what lower layers hold in `directory` (`.wh..wh..opq`).
    Opaque { directory: Vec<&'a [u8]> },
    /// Bookkeeping of the AUFS driver (`.wh..wh.plnk` and the like), which is no content.
    Bookkeeping,
}

/// Splits a member path and classifies it by the whiteout rules of the OCI image specification.
pub(crate) fn classify(path: &[u8], max_path_bytes: usize) -> Result<MemberPath<'_>, Refusal> {
    // `/` alone is how some tools name the root directory; it leads nowhere else.
    let slashes = path.iter().take_while(|&&byte| byte == b'/').count();
    let path = if slashes == path.len() && slashes > 0 {
        b"."
    } else {
        path
    };
    let mut parent = components(path, max_path_bytes)?;
    let Some(name) = parent.pop() else {
        return if path.is_empty() {
            Err(Refusal::EmptyName)
        } else {
            Ok(MemberPath::Root)
        };
    };
    if parent
        .iter()
        .any(|component| component.starts_with(RESERVED_PREFIX))
    {
        return Ok(MemberPath::Bookkeeping);
    }
    if parent
        .iter()
        .any(|component| component.starts_with(WHITEOUT_PREFIX))
    {
        return Err(Refusal::BadWhiteout);
    }
    if name == OPAQUE_NAME {
        return Ok(MemberPath::Opaque { directory: parent });
    }
    if name.starts_with(RESERVED_PREFIX) {
        return Ok(MemberPath::Bookkeeping);
    }
    match name.strip_prefix(WHITEOUT_PREFIX) {
        Some(b"" | b"." | b"..") => Err(Refusal::BadWhiteout),
        Some(hidden) => Ok(MemberPath::Whiteout {
            parent,
            name: hidden,
        }),
        None => Ok(MemberPath::Entry { parent, name }),
    }
}

/// The components of a path that must stay inside the image; `.` and repeated slashes vanish.
pub(crate) fn components(path: &[u8], max_path_bytes: usize) -> Result<Vec<&[u8]>, Refusal> {
    if path.len() > max_path_bytes {
        return Err(Refusal::PathTooLong {
            length_bytes: path.len(),
            limit_bytes: max_path_bytes,
        });
    }
    if path.contains(&0) {
        return Err(Refusal::NulByte);
    }
    if path.starts_with(b"/") {
        return Err(Refusal::Absolute);
    }
    let mut components = Vec::with_capacity(8);
    for component in path.split(|&byte| byte == b'/') {
        match component {
            b"" | b"." => {}
            b".." => return Err(Refusal::ParentComponent),
            name if name.len() > MAX_NAME_BYTES => return Err(Refusal::NameTooLong(name.len())),
            name => components.push(name),
        }
    }
    Ok(components)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn classified(path: &str) -> Result<MemberPath<'_>, Refusal> {
        classify(path.as_bytes(), 4096)
    }

    #[test]
    fn ordinary_paths_lose_dots_and_slashes() {
        let expected = MemberPath::Entry {
            parent: vec![b"a", b"b"],
            name: b"c",
        };
        for path in ["a/b/c", "./a/b/c", "a//b/./c/", "a/b/c///"] {
            assert_eq!(classified(path).unwrap(), expected, "{path}");
        }
        for path in [".", "./", ".//.", "/", "//"] {
            assert_eq!(classified(path).unwrap(), MemberPath::Root, "{path}");
        }
    }

    #[test]
    fn whiteouts_are_told_apart() {
        let opaque = MemberPath::Opaque {
            directory: vec![b"d"],
        };
        assert_eq!(classified("d/.wh..wh..opq").unwrap(), opaque);
        let whiteout = MemberPath::Whiteout {
            parent: vec![b"d"],
            name: b"x",
        };
        assert_eq!(classified("d/.wh.x").unwrap(), whiteout);
        for path in [".wh..wh.plnk", ".wh..wh.plnk/1.2", ".wh..wh.aufs"] {
            assert_eq!(classified(path).unwrap(), MemberPath::Bookkeeping, "{path}");
        }
        for path in [".wh.", ".wh..", ".wh...", "a/.wh.b/c"] {
            assert_eq!(classified(path), Err(Refusal::BadWhiteout), "{path}");
        }
    }

    #[test]
    fn paths_that_climb_out_are_refused() {
        assert_eq!(classified("/etc/passwd"), Err(Refusal::Absolute));
        for path in ["..", "../x", "a/../../x", "a/..", "./..", "a/b/../c"] {
            assert_eq!(classified(path), Err(Refusal::ParentComponent), "{path}");
        }
        assert_eq!(classified(""), Err(Refusal::EmptyName));
        assert_eq!(classified("a\0b"), Err(Refusal::NulByte));
        assert_eq!(classified(&"n".repeat(256)), Err(Refusal::NameTooLong(256)));
        assert!(classified(&"n".repeat(255)).is_ok());
        assert!(matches!(
            classified(&"d/".repeat(2049)),
            Err(Refusal::PathTooLong { .. })
        ));
    }
}
