//! Makes tar archives byte by byte, so that odd and hostile ones can be made too.

/// One member; `..Entry::file("x", b"")`-style updates set what matters.
#[derive(Clone, Debug)]
pub struct Entry {
    pub path: Vec<u8>,
    pub kind: u8,
    pub mode: u32,
    pub uid: u64,
    pub gid: u64,
    pub mtime: i64,
    pub link: Vec<u8>,
    pub major: u32,
    pub minor: u32,
    pub data: Vec<u8>,
    /// Records of a PAX header before the member.
    pub pax: Vec<(Vec<u8>, Vec<u8>)>,
    /// What the header says when it is not the length of `data`.
    pub size: Option<u64>,
    /// Uses GNU's long name members instead of PAX for long names.
    pub gnu: bool,
}

impl Entry {
    pub fn new(kind: u8, path: impl AsRef<[u8]>) -> Self {
        Self {
            path: path.as_ref().to_vec(),
            kind,
            mode: if kind == b'5' { 0o755 } else { 0o644 },
            uid: 0,
            gid: 0,
            mtime: 1_600_000_000,
            link: Vec::new(),
            major: 0,
            minor: 0,
            data: Vec::new(),
            pax: Vec::new(),
            size: None,
            gnu: false,
        }
    }

    pub fn file(path: impl AsRef<[u8]>, data: impl AsRef<[u8]>) -> Self {
        Self {
            data: data.as_ref().to_vec(),
            ..Self::new(b'0', path)
        }
    }

    pub fn dir(path: impl AsRef<[u8]>) -> Self {
        Self::new(b'5', path)
    }

    pub fn symlink(path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        Self {
            mode: 0o777,
            link: target.as_ref().to_vec(),
            ..Self::new(b'2', path)
        }
    }

    pub fn hard_link(path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        Self {
            link: target.as_ref().to_vec(),
            ..Self::new(b'1', path)
        }
    }

    pub fn mode(mut self, mode: u32) -> Self {
        self.mode = mode;
        self
    }

    pub fn owner(mut self, uid: u64, gid: u64) -> Self {
        (self.uid, self.gid) = (uid, gid);
        self
    }

    pub fn device(mut self, major: u32, minor: u32) -> Self {
        (self.major, self.minor) = (major, minor);
        self
    }

    pub fn pax(mut self, key: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> Self {
        self.pax
            .push((key.as_ref().to_vec(), value.as_ref().to_vec()));
        self
    }

    pub fn xattr(self, name: &str, value: impl AsRef<[u8]>) -> Self {
        self.pax(format!("SCHILY.xattr.{name}"), value)
    }

    /// The member with all its headers and padding.
    pub fn bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let mut pax = self.pax.clone();
        let long = |field: &[u8]| field.len() > 100;
        if self.gnu {
            for (kind, text) in [(b'L', &self.path), (b'K', &self.link)] {
                if long(text) {
                    let mut data = text.clone();
                    data.push(0);
                    out.extend(
                        Entry {
                            data,
                            ..Entry::new(kind, "././@LongLink")
                        }
                        .plain_bytes(),
                    );
                }
            }
        } else {
            for (key, text) in [("path", &self.path), ("linkpath", &self.link)] {
                if long(text) {
                    pax.push((key.into(), text.clone()));
                }
            }
        }
        for (key, id) in [("uid", self.uid), ("gid", self.gid)] {
            if id > 0o7_777_777 {
                pax.push((key.into(), id.to_string().into_bytes()));
            }
        }
        if !pax.is_empty() {
            let data = pax_records(&pax);
            out.extend(
                Entry {
                    data,
                    ..Entry::new(b'x', "PaxHeaders/x")
                }
                .plain_bytes(),
            );
        }
        out.extend(self.plain_bytes());
        out
    }

    fn plain_bytes(&self) -> Vec<u8> {
        let mut out = self.header().to_vec();
        out.extend_from_slice(&self.data);
        out.resize(out.len().next_multiple_of(512), 0);
        out
    }

    /// The ustar header alone.
    pub fn header(&self) -> [u8; 512] {
        let mut header = [0u8; 512];
        let mut put = |at: usize, text: &[u8]| header[at..at + text.len()].copy_from_slice(text);
        put(0, &self.path[..self.path.len().min(100)]);
        put(100, format!("{:07o}", self.mode).as_bytes());
        put(108, format!("{:07o}", self.uid.min(0o7_777_777)).as_bytes());
        put(116, format!("{:07o}", self.gid.min(0o7_777_777)).as_bytes());
        put(
            124,
            format!("{:011o}", self.size.unwrap_or(self.data.len() as u64)).as_bytes(),
        );
        if self.mtime >= 0 {
            put(136, format!("{:011o}", self.mtime).as_bytes());
        } else {
            put(136, &[0xff; 4]);
            put(140, &self.mtime.to_be_bytes());
        }
        put(156, &[self.kind]);
        put(157, &self.link[..self.link.len().min(100)]);
        put(
            257,
            if self.gnu {
                b"ustar  \0"
            } else {
                b"ustar\x0000"
            },
        );
        put(329, format!("{:07o}", self.major).as_bytes());
        put(337, format!("{:07o}", self.minor).as_bytes());
        seal(&mut header);
        header
    }
}

/// Computes the checksum of a header.
pub fn seal(header: &mut [u8; 512]) {
    header[148..156].copy_from_slice(b"        ");
    let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

/// PAX records with their lengths.
pub fn pax_records(records: &[(Vec<u8>, Vec<u8>)]) -> Vec<u8> {
    let mut out = Vec::new();
    for (key, value) in records {
        let body = key.len() + value.len() + 3;
        let mut length = body + 1;
        while length != body + length.to_string().len() {
            length = body + length.to_string().len();
        }
        out.extend(format!("{length} ").into_bytes());
        out.extend_from_slice(key);
        out.push(b'=');
        out.extend_from_slice(value);
        out.push(b'\n');
    }
    out
}

/// A whole archive.
pub fn tar(entries: &[Entry]) -> Vec<u8> {
    let mut out: Vec<u8> = entries.iter().flat_map(Entry::bytes).collect();
    out.extend([0; 1024]);
    out
}
