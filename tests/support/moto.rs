//! moto, an S3 server that is not ours, in a process of its own. It keeps objects in memory and takes any signature.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::process::{Child, Command, Stdio};

use super::needs::program;
use super::s3::s3_storage;
use super::s3_server::BUCKET;

/// A running server with an empty bucket; it is killed when dropped.
#[derive(Debug)]
pub struct Moto {
    process: Child,
    port: u16,
}

impl Moto {
    /// Starts a server on a port of its own choice.
    pub fn start() -> Self {
        let mut command = Command::new(program("moto_server").expect("the test required it"));
        command.args(["-H", "127.0.0.1", "-p", "0"]).stdin(Stdio::null()).stdout(Stdio::null());
        let mut process = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut said = BufReader::new(process.stderr.take().unwrap()).lines().map(Result::unwrap);
        let running = said.find_map(|line| line.split_once("Running on http://127.0.0.1:")?.1.parse().ok());
        // It goes on to write a line for each request, and stops where nobody reads them.
        std::thread::spawn(move || said.for_each(drop));
        let moto = Self { process, port: running.expect("moto says where it listens") };
        moto.create_bucket();
        moto
    }

    /// Returns the server's address, `http://127.0.0.1:port`.
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Returns the lines of `[storage]` for it.
    pub fn storage(&self) -> String {
        s3_storage(&self.endpoint())
    }

    fn create_bucket(&self) {
        let mut socket = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).unwrap();
        let request = format!(
            "PUT /{BUCKET} HTTP/1.1\r\nhost: 127.0.0.1:{}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
            self.port
        );
        socket.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        socket.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
}

impl Drop for Moto {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
