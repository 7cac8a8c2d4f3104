//! The HTTP interface of a VM's process, seen from outside.

use std::path::{Path, PathBuf};
use std::time::Duration;

use dunlin_api::place::{RuntimeDirectory, VmPlace};
use dunlin_api::{ApiError, ErrorCode, VmName};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use crate::error::CliError;

/// Largest answer that is read.
const MAX_ANSWER: usize = 16 << 20;
/// Longest wait for an answer; saving a large guest takes its time.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(600);

/// The runtime directory of this user.
pub fn runtime_directory() -> RuntimeDirectory {
    RuntimeDirectory::from_environment(rustix::process::geteuid().as_raw())
}

/// One VM's process.
#[derive(Debug, Clone)]
pub struct Client {
    name: VmName,
    place: VmPlace,
    directory: PathBuf,
}

impl Client {
    /// The process of VM `name` in this user's runtime directory.
    pub fn new(name: &VmName) -> Self {
        let runtime = runtime_directory();
        Self {
            name: name.clone(),
            place: runtime.vm(name),
            directory: runtime.path().to_owned(),
        }
    }

    /// The VM's name.
    pub fn name(&self) -> &VmName {
        &self.name
    }

    /// The VM's files.
    pub fn place(&self) -> &VmPlace {
        &self.place
    }

    /// Asks for `path`.
    ///
    /// # Errors
    /// [`CliError`] when there is no such VM, or it refuses.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, CliError> {
        self.request(Method::GET, path, Bytes::new()).await
    }

    /// Sends `body` to `path`.
    ///
    /// # Errors
    /// [`CliError`] when there is no such VM, or it refuses.
    pub async fn post<B: Serialize + Sync, T: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
    ) -> Result<T, CliError> {
        let bytes = serde_json::to_vec(body).map_err(|error| self.no_answer(error))?;
        self.request(Method::POST, path, bytes.into()).await
    }

    fn no_answer(&self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> CliError {
        CliError::NoAnswer {
            name: self.name.clone(),
            source: source.into(),
        }
    }

    /// Connects to one of the VM's sockets.
    ///
    /// # Errors
    /// [`CliError::NoSuchVm`] when nobody listens there.
    pub async fn connect(&self, socket: &Path) -> Result<UnixStream, CliError> {
        UnixStream::connect(socket)
            .await
            .map_err(|error| match error.kind() {
                std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused => {
                    CliError::NoSuchVm {
                        name: self.name.clone(),
                        directory: self.directory.clone(),
                    }
                }
                _ => self.no_answer(error),
            })
    }

    async fn request<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<T, CliError> {
        let stream = self.connect(&self.place.api_socket()).await?;
        match tokio::time::timeout(ANSWER_TIMEOUT, self.exchange(stream, method, path, body)).await
        {
            Ok(answer) => answer,
            Err(elapsed) => Err(self.no_answer(elapsed)),
        }
    }

    async fn exchange<T: DeserializeOwned>(
        &self,
        stream: UnixStream,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<T, CliError> {
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| self.no_answer(error))?;
        let driver = tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "dunlin")
            .header("content-type", "application/json")
            .body(Full::new(body))
            .map_err(|error| self.no_answer(error))?;
        let response = sender
            .send_request(request)
            .await
            .map_err(|error| self.no_answer(error))?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_ANSWER)
            .collect()
            .await;
        let bytes = body.map_err(|error| self.no_answer(error))?.to_bytes();
        driver.abort();
        if status.is_success() {
            return serde_json::from_slice(&bytes).map_err(|error| self.no_answer(error));
        }
        Err(CliError::Refused(refusal(status, &bytes)))
    }
}

fn refusal(status: StatusCode, body: &[u8]) -> ApiError {
    serde_json::from_slice(body).unwrap_or_else(|_not_ours| {
        let text = String::from_utf8_lossy(body);
        let text = text.trim().chars().take(200).collect::<String>();
        ApiError::new(
            ErrorCode::Unknown,
            format!("the VM's process answered {status}: {text}"),
        )
    })
}
