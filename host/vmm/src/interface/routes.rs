//! HTTP: each route is one message to the lifecycle.

use std::time::{Duration, Instant};

use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use dunlin_api::migration::{MigrateRequest, MigrationStatus};
use dunlin_api::plan::MovePrediction;
use dunlin_api::profile::{ProfileReport, ProfileRequest};
use dunlin_api::snapshot::SaveStatus;
use dunlin_api::status::ExitReport;
use dunlin_api::{ApiError, ErrorCode, route};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::oneshot;

use super::Peers;
use crate::lifecycle::{Message, Reply};
use crate::machine::collect_every;

/// How long exits and dirty pages are counted for a report.
const LOOK: Duration = Duration::from_millis(200);
/// Slices of time in which dirty pages are counted for a prediction, in milliseconds.
const FIRST_SLICES: [u64; 4] = [2, 3, 5, 15];
/// Those that follow.
const SLICE: u64 = 25;
/// How many follow.
const SLICES: usize = 19;
/// Slices after those, in milliseconds, and how many there are at most.
const LONG_SLICE: u64 = 100;
const MORE_SLICES: usize = 15;
/// So small a part of the pages of a slice may be new when the measurement ends.
const FEW: u64 = 10;
/// Largest request body; the largest request is a path.
const MAX_BODY: usize = 64 << 10;

/// The routes.
pub(super) fn router(peers: Peers) -> Router {
    Router::new()
        .route(route::VM, get(|State(p)| ask(p, Message::Status)))
        .route(route::CONFIG, get(|State(p)| ask(p, Message::Config)))
        .route(route::PAUSE, post(|State(p)| ask(p, Message::Pause)))
        .route(route::RESUME, post(|State(p)| ask(p, Message::Resume)))
        .route(route::STOP, post(|State(p)| ask(p, Message::Stop)))
        .route(
            route::SAVE,
            post(|State(p), body| ask_with(p, body, Message::Save)).get(saving),
        )
        .route(route::SAVE_CANCEL, post(cancel_save))
        .route(
            route::MIGRATE,
            post(|State(p), body| ask_with(p, body, Message::Migrate)),
        )
        .route(
            route::HAND_OVER,
            post(|State(p), body| ask_with(p, body, Message::HandOver)),
        )
        .route(
            route::PREDICTION,
            post(|State(p), body| prediction(p, body)),
        )
        .route(route::EXITS, get(exits))
        .route(route::PROFILE, post(|State(p), body| profile(p, body)))
        .route(route::MIGRATION, get(migration))
        .route(route::CANCEL, post(cancel))
        .fallback(|| async { no_route() })
        .method_not_allowed_fallback(|| async { no_route() })
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(peers)
}

/// A refusal as a response.
struct Refused(ApiError);

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let status = match self.0.code {
            ErrorCode::InvalidRequest => StatusCode::BAD_REQUEST,
            ErrorCode::NotFound => StatusCode::NOT_FOUND,
            ErrorCode::WrongState | ErrorCode::Busy | ErrorCode::Cancelled => StatusCode::CONFLICT,
            ErrorCode::Peer => StatusCode::BAD_GATEWAY,
            ErrorCode::Host | ErrorCode::Unknown => StatusCode::INTERNAL_SERVER_ERROR,
        };
        (status, Json(self.0)).into_response()
    }
}

type Answer<T> = Result<Json<T>, Refused>;

fn no_route() -> Refused {
    Refused(
        ApiError::new(ErrorCode::NotFound, "there is no such path or method")
            .with_hint("the paths are those of version 1, /v1/vm and below"),
    )
}

async fn ask<T>(peers: Peers, message: impl FnOnce(Reply<T>) -> Message) -> Answer<T> {
    let (reply, answer) = oneshot::channel();
    peers.mailbox.send(message(reply));
    match answer.await {
        Ok(result) => result.map(Json).map_err(Refused),
        Err(_gone) => Err(Refused(ApiError::new(
            ErrorCode::WrongState,
            "the VM has ended",
        ))),
    }
}

/// The answer of work that goes on when whoever asked for it leaves.
async fn finish<T>(work: tokio::task::JoinHandle<Answer<T>>) -> Answer<T> {
    work.await.unwrap_or_else(|_panicked| {
        let lost = "what was begun for the request broke off";
        Err(Refused(ApiError::new(ErrorCode::Unknown, lost)))
    })
}

async fn ask_with<B: DeserializeOwned, T: Serialize>(
    peers: Peers,
    body: Bytes,
    message: impl FnOnce(B, Reply<T>) -> Message,
) -> Answer<T> {
    let body = read(&body)?;
    ask(peers, |reply| message(body, reply)).await
}

fn read<B: DeserializeOwned>(body: &Bytes) -> Result<B, Refused> {
    serde_json::from_slice(body).map_err(|error| {
        Refused(ApiError::new(
            ErrorCode::InvalidRequest,
            format!("the request is unreadable: {error}"),
        ))
    })
}

/// Measures for half a second, and for up to two where the guest goes on to pages that it has not
/// written before: short slices first, since a short time is what the last rounds take.
async fn prediction(peers: Peers, body: Bytes) -> Answer<MovePrediction> {
    let request: MigrateRequest = read(&body)?;
    // Whoever asks may leave; what was begun is ended all the same.
    finish(tokio::spawn(predict(peers, request))).await
}

async fn predict(peers: Peers, request: MigrateRequest) -> Answer<MovePrediction> {
    let Json(()) = ask(peers.clone(), Message::BeginSurvey).await?;
    for milliseconds in FIRST_SLICES.into_iter().chain([SLICE; SLICES]) {
        tokio::time::sleep(Duration::from_millis(milliseconds)).await;
        let Json(_) = ask(peers.clone(), Message::Survey).await?;
    }
    for _ in 0..MORE_SLICES {
        tokio::time::sleep(Duration::from_millis(LONG_SLICE)).await;
        let Json(slice) = ask(peers.clone(), Message::Survey).await?;
        if slice.fresh <= slice.dirtied / FEW {
            break;
        }
    }
    ask(peers, |reply| Message::EndSurvey(request, reply)).await
}

async fn exits(State(peers): State<Peers>) -> Answer<ExitReport> {
    finish(tokio::spawn(count_exits(peers))).await
}

async fn count_exits(peers: Peers) -> Answer<ExitReport> {
    let Json(()) = ask(peers.clone(), Message::BeginLook).await?;
    tokio::time::sleep(LOOK).await;
    ask(peers, Message::EndLook).await
}

async fn profile(peers: Peers, body: Bytes) -> Answer<ProfileReport> {
    let request: ProfileRequest = read(&body)?;
    // Whoever asks may leave; what was begun is ended all the same.
    finish(tokio::spawn(take_profile(peers, request))).await
}

async fn take_profile(peers: Peers, request: ProfileRequest) -> Answer<ProfileReport> {
    let Json(()) = ask(peers.clone(), |reply| Message::BeginProfile(request, reply)).await?;
    let end = Instant::now() + Duration::from_millis(request.duration_ms);
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let pause = collect_every(&request).min(left);
        if pause.is_zero() {
            break;
        }
        tokio::time::sleep(pause).await;
        let Json(()) = ask(peers.clone(), Message::CollectProfile).await?;
    }
    ask(peers, Message::EndProfile).await
}

async fn migration(State(peers): State<Peers>) -> Answer<MigrationStatus> {
    Ok(Json(peers.monitor.status()))
}

async fn cancel(State(peers): State<Peers>) -> Answer<MigrationStatus> {
    peers.monitor.cancel();
    Ok(Json(peers.monitor.status()))
}

async fn saving(State(peers): State<Peers>) -> Answer<SaveStatus> {
    Ok(Json(peers.saves.status()))
}

async fn cancel_save(State(peers): State<Peers>) -> Answer<SaveStatus> {
    peers.saves.cancel();
    Ok(Json(peers.saves.status()))
}
