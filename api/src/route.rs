//! Paths of the HTTP interface on a VM's API socket. Bodies are JSON; a refusal is an
//! [`crate::ApiError`] with a 4xx or 5xx status.

/// GET: [`crate::status::VmStatus`].
pub const VM: &str = "/v1/vm";
/// POST: stops the guest between two instructions; answers the status.
pub const PAUSE: &str = "/v1/vm/pause";
/// POST: goes on; answers the status.
pub const RESUME: &str = "/v1/vm/resume";
/// POST: ends the VM; answers the last status.
pub const STOP: &str = "/v1/vm/stop";
/// POST [`crate::migration::MigrateRequest`]: begins a move; answers the migration's status.
pub const MIGRATE: &str = "/v1/vm/migrate";
/// POST [`crate::migration::MigrateRequest`]: what such a move would take; nothing moves. Answers
/// [`crate::plan::MovePrediction`].
pub const PREDICTION: &str = "/v1/vm/migration/prediction";
/// POST [`crate::snapshot::SaveRequest`]: saves the guest and leaves it paused, or begins to save
/// a guest that runs on; answers the status. GET: [`crate::snapshot::SaveStatus`] of the latter.
pub const SAVE: &str = "/v1/vm/save";
/// POST: asks the current save of a running guest to end; answers its status.
pub const SAVE_CANCEL: &str = "/v1/vm/save/cancel";
/// POST [`crate::handover::HandOverRequest`]: hands the guest to another process of this host.
/// Answers [`crate::handover::HandOverReport`] when that runs it; this process then ends.
pub const HAND_OVER: &str = "/v1/vm/handover";
/// GET: [`crate::status::ExitReport`].
pub const EXITS: &str = "/v1/vm/exits";
/// POST [`crate::profile::ProfileRequest`]: looks where the processors' time goes, for as long as is
/// asked for. Answers [`crate::profile::ProfileReport`].
pub const PROFILE: &str = "/v1/vm/profile";
/// GET: [`crate::migration::MigrationStatus`].
pub const MIGRATION: &str = "/v1/vm/migration";
/// POST: asks the current move to end; the guest goes on here.
pub const CANCEL: &str = "/v1/vm/migration/cancel";
/// GET: [`crate::VmConfig`].
pub const CONFIG: &str = "/v1/vm/config";
