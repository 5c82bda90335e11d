//! A registry that does what no decent one does. It speaks just enough HTTP.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

/// A request: its path with the query, and its headers in lower case.
pub(crate) struct Request {
    pub(crate) path: String,
    pub(crate) headers: Vec<String>,
}

impl Request {
    pub(crate) fn has(&self, header: &str) -> bool {
        self.headers
            .iter()
            .any(|found| *found == header.to_lowercase())
    }
}

/// What is sent back: status, headers, body; then as many zero bytes.
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Vec<String>,
    pub(crate) body: Vec<u8>,
    /// Sent after the body until the client closes the connection.
    pub(crate) endless: bool,
}

impl Answer {
    pub(crate) fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self {
            status,
            headers: Vec::new(),
            body: body.into(),
            endless: false,
        }
    }

    pub(crate) fn header(mut self, header: String) -> Self {
        self.headers.push(header);
        self
    }
}

pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    seen: Arc<Mutex<Vec<String>>>,
}

impl Server {
    /// `answer` is called for each request, with the server's address.
    pub(crate) fn start(
        answer: impl Fn(&Request, SocketAddr) -> Answer + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (answer, log) = (Arc::new(answer), seen.clone());
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (answer, log) = (answer.clone(), log.clone());
                thread::spawn(move || serve(&stream.unwrap(), address, &*answer, &log));
            }
        });
        Self { address, seen }
    }

    /// Paths of all requests so far.
    pub(crate) fn seen(&self) -> Vec<String> {
        self.seen.lock().unwrap().clone()
    }
}

/// One request for each connection.
fn serve(
    mut stream: &TcpStream,
    address: SocketAddr,
    answer: &dyn Fn(&Request, SocketAddr) -> Answer,
    seen: &Mutex<Vec<String>>,
) {
    let mut lines = BufReader::new(stream).lines();
    let Some(Ok(first)) = lines.next() else {
        return;
    };
    let Some(path) = first.split(' ').nth(1) else {
        return;
    };
    seen.lock().unwrap().push(path.to_owned());
    let headers = lines
        .map_while(Result::ok)
        .take_while(|line| !line.is_empty());
    let headers = headers.map(|line| line.to_lowercase()).collect();
    let answer = answer(
        &Request {
            path: path.to_owned(),
            headers,
        },
        address,
    );
    let mut head = format!("HTTP/1.1 {} x\r\nconnection: close\r\n", answer.status);
    for header in &answer.headers {
        head += &format!("{header}\r\n");
    }
    if !answer.endless {
        head += &format!("content-length: {}\r\n", answer.body.len());
    }
    let mut sent = stream.write_all(format!("{head}\r\n").as_bytes());
    sent = sent.and_then(|()| stream.write_all(&answer.body));
    while answer.endless && sent.is_ok() {
        sent = stream.write_all(&[b' '; 65536]);
    }
}
