//! The container's own passwd and group files: who `--user` is. Parsing only, no I/O.
//!
//! The rules are Podman's and Docker's (opencontainers/runc, `user.GetExecUser`): a name is looked
//! up first, a number needs no entry; supplementary groups come from the group file unless a
//! group was given.

/// Largest user or group id; the value above it means "no id" to the kernel.
const MAX_ID: u32 = u32::MAX - 1;

/// Who a process runs as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identity {
    /// User id.
    pub(crate) uid: u32,
    /// Primary group.
    pub(crate) gid: u32,
    /// Supplementary groups.
    pub(crate) groups: Vec<u32>,
    /// Home directory.
    pub(crate) home: String,
}

/// An entry of a passwd file.
pub(crate) struct PasswdEntry<'a> {
    /// Login name.
    pub(crate) name: &'a str,
    /// User id.
    pub(crate) uid: u32,
    gid: u32,
    home: &'a str,
}

/// The well-formed entries of a passwd file; other lines are passed over, as libc does.
pub(crate) fn passwd_entries(text: &str) -> impl Iterator<Item = PasswdEntry<'_>> {
    text.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let _password = fields.next()?;
        let uid = number(fields.next()?)?;
        let gid = number(fields.next()?)?;
        let _comment = fields.next();
        let home = fields.next().unwrap_or("");
        Some(PasswdEntry {
            name,
            uid,
            gid,
            home,
        })
    })
}

struct GroupEntry<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

fn group_entries(text: &str) -> impl Iterator<Item = GroupEntry<'_>> {
    text.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let _password = fields.next()?;
        let gid = number(fields.next()?)?;
        let members = fields.next().unwrap_or("");
        Some(GroupEntry { name, gid, members })
    })
}

fn number(text: &str) -> Option<u32> {
    text.parse().ok().filter(|id| *id <= MAX_ID)
}

/// Resolves `user[:group]`; empty means root. The error is a sentence.
pub(crate) fn resolve(spec: &str, passwd: &str, group: &str) -> Result<Identity, String> {
    let (user, wanted_group) = match spec.split_once(':') {
        Some((user, group)) => (user, group),
        None => (spec, ""),
    };
    let user = if user.is_empty() { "0" } else { user };
    let by_number = number(user);
    let entry = passwd_entries(passwd)
        .find(|entry| entry.name == user)
        .or_else(|| passwd_entries(passwd).find(|entry| Some(entry.uid) == by_number));
    let (name, uid, gid, home) = match (entry, by_number) {
        (Some(entry), _) => (Some(entry.name), entry.uid, entry.gid, entry.home),
        (None, Some(uid)) => (None, uid, 0, ""),
        (None, None) => {
            return Err(format!(
                "the user '{user}' is neither in the container's /etc/passwd nor a number"
            ));
        }
    };
    let mut identity = Identity {
        uid,
        gid,
        groups: Vec::new(),
        home: if home.is_empty() { "/" } else { home }.to_owned(),
    };
    if !wanted_group.is_empty() {
        identity.gid = resolve_group(wanted_group, group)?;
    } else if let Some(name) = name {
        identity.groups = group_entries(group)
            .filter(|entry| entry.members.split(',').any(|member| member == name))
            .map(|entry| entry.gid)
            .collect();
    }
    Ok(identity)
}

fn resolve_group(wanted: &str, group: &str) -> Result<u32, String> {
    group_entries(group)
        .find(|entry| entry.name == wanted)
        .map(|entry| entry.gid)
        .or_else(|| number(wanted))
        .ok_or_else(|| {
            format!("the group '{wanted}' is neither in the container's /etc/group nor a number")
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\n\
        # a comment\nbroken line\nshort:x\n\
        daemon:x:1:1::/usr/sbin:/usr/sbin/nologin\n\
        app:x:1000:1001:App,,,:/home/app:/bin/sh\n\
        nohome:x:1002:1002:::\n\
        nobody:x:4294967295:0::/:\nnogroup:x:5:4294967295::/:\n\
        4242:x:77:78::/named-by-number:/bin/sh\n\
        huge:x:4294967296:0::/:\n";
    const GROUP: &str = "root:x:0:\nadm:x:4:app,daemon\naudio:x:29:daemon,app\nstaff:x:50:\n\
        app:x:1001:\nbroken\nprefix:x:99:apparently\nunset:x:4294967295:app\n";

    fn resolved(spec: &str) -> Identity {
        resolve(spec, PASSWD, GROUP).unwrap()
    }

    #[test]
    fn empty_is_root_with_its_home() {
        let root = resolved("");
        assert_eq!((root.uid, root.gid, root.home.as_str()), (0, 0, "/root"));
        assert_eq!(resolved(":staff").gid, 50);
    }

    #[test]
    fn a_name_brings_its_groups() {
        let app = resolved("app");
        assert_eq!((app.uid, app.gid), (1000, 1001));
        assert_eq!(app.groups, [4, 29]);
        assert_eq!(app.home, "/home/app");
    }

    #[test]
    fn a_number_with_an_entry_is_that_user() {
        let app = resolved("1000");
        assert_eq!((app.gid, app.groups), (1001, vec![4, 29]));
    }

    #[test]
    fn a_number_without_an_entry_is_in_the_root_group() {
        let user = resolved("5555");
        assert_eq!((user.uid, user.gid, user.home.as_str()), (5555, 0, "/"));
        assert_eq!(user.groups, [0_u32; 0]);
    }

    /// The kernel takes this id for "leave it as it is", which is root.
    #[test]
    fn the_id_that_is_none_is_nobodys() {
        for spec in [
            "nobody",
            "4294967295",
            "nogroup",
            "app:unset",
            "app:4294967295",
        ] {
            assert!(resolve(spec, PASSWD, GROUP).is_err(), "{spec}");
        }
        assert_eq!(resolved("app").groups, [4, 29]);
    }

    #[test]
    fn a_given_group_replaces_all_others() {
        let app = resolved("app:staff");
        assert_eq!((app.gid, app.groups), (50, vec![]));
        assert_eq!(resolved("1000:1234").gid, 1234);
    }

    #[test]
    fn a_name_made_of_digits_wins_over_the_number() {
        assert_eq!(resolved("4242").uid, 77);
    }

    #[test]
    fn an_empty_home_is_the_root_directory() {
        assert_eq!(resolved("nohome").home, "/");
    }

    #[test]
    fn unknown_names_and_impossible_numbers_are_refused() {
        for spec in ["ghost", "huge", "-1", "4294967295", "app:ghosts", "app:-1"] {
            assert!(resolve(spec, PASSWD, GROUP).is_err(), "{spec}");
        }
        assert_eq!(
            resolve("ghost", "", "").unwrap_err(),
            "the user 'ghost' is neither in the container's /etc/passwd nor a number"
        );
    }
}
