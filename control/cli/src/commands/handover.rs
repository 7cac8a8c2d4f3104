//! `handover`: a process of this program goes on with a VM that another process of this host has.

use std::path::PathBuf;
use std::time::Duration;

use dunlin_api::handover::{HandOverReport, HandOverRequest};
use dunlin_api::launch::{GuestOrigin, LaunchReply, Start};
use dunlin_api::migration::{Endpoint, SwitchOverReport};
use dunlin_api::status::{VmState, VmStatus};
use dunlin_api::{ApiError, ErrorCode, VmName, route};
use serde::Serialize;

use super::lifecycle::wait_for_end;
use crate::args::HandOverArgs;
use crate::client::Client;
use crate::error::CliError;
use crate::launch::VmProcess;
use crate::printer::{Printer, table};
use crate::terminal::Interrupts;

/// How long a new process may take to say what became of the guest once nobody hands it over any
/// more.
const LAST_WORD: Duration = Duration::from_secs(40);

/// What is printed for programs.
#[derive(Serialize)]
struct HandedOver<'a> {
    name: &'a VmName,
    /// The process that had the guest, and the version of its program.
    from_pid: u32,
    from_program: &'a str,
    /// The process that has it now, and the version of its program.
    pid: u32,
    program: &'a str,
    /// Absent when the old process died before it could tell.
    #[serde(flatten)]
    report: Option<&'a HandOverReport>,
}

/// Replaces a VM's process.
pub(super) async fn hand_over(args: HandOverArgs, printer: &Printer) -> Result<(), CliError> {
    let client = Client::new(&args.name);
    let old: VmStatus = client.get(route::VM).await?;
    let mut interrupts = Interrupts::listen()?;
    let name = args.name.clone();
    let mut process = VmProcess::start(GuestOrigin::HandOver { name }, Start::AtOnce)?;
    let socket = tokio::select! {
        socket = listening(&mut process) => match socket? {
            Some(socket) => socket,
            None => return Err(process.ended()),
        },
        () = interrupts.next() => {
            process.end().await;
            return Err(CliError::Interrupted);
        }
    };
    let request = HandOverRequest {
        to: socket,
        pid: process.id(),
        downtime_ms: u64::try_from(args.downtime.as_millis()).unwrap_or(u64::MAX),
    };
    let asked = client.post::<_, HandOverReport>(route::HAND_OVER, &request);
    tokio::pin!(asked);
    let answer = tokio::select! {
        answer = &mut asked => answer,
        () = interrupts.next() => {
            // Without its parent the new process waits no longer. Who has the guest then, both say.
            process.let_go();
            asked.await
        }
    };
    // Whatever the answer was: the new process knows whether the guest came.
    if answer.is_err() {
        process.let_go();
    }
    let arrived = tokio::time::timeout(LAST_WORD, arrived(&mut process)).await;
    match (arrived, answer) {
        (Ok(Ok(Some(status))), answer) => {
            process.detach()?;
            wait_for_end(old.pid).await;
            report(&old, &status, answer.ok().as_ref(), printer);
            Ok(())
        }
        (_, Err(error)) => {
            let now = client.get::<VmStatus>(route::VM).await;
            let stays = now.is_ok_and(|now| now.state == VmState::Running && now.pid == old.pid);
            Err(if stays { with_hint(error, &old) } else { error })
        }
        (Ok(Err(error)), Ok(_)) => Err(error),
        (Ok(Ok(None)) | Err(_), Ok(_)) => {
            let name = &args.name;
            let said = format!("the new process of VM \"{name}\" ended after it had the guest");
            Err(ApiError::new(ErrorCode::Unknown, said).into())
        }
    }
}

fn with_hint(error: CliError, old: &VmStatus) -> CliError {
    match error {
        CliError::Refused(refused) if refused.hint.is_none() => {
            let hint = format!("the VM goes on in process {}", old.pid);
            CliError::Refused(refused.with_hint(hint))
        }
        error => error,
    }
}

/// Where the new process waits; `None` when it ended without a word.
async fn listening(process: &mut VmProcess) -> Result<Option<PathBuf>, CliError> {
    while let Some(reply) = process.reply().await? {
        match reply {
            LaunchReply::Listening(Endpoint::Unix(path)) => return Ok(Some(path)),
            LaunchReply::Failed(error) => return Err(error.into()),
            LaunchReply::Listening(_) | LaunchReply::Ready(_) | LaunchReply::Ended(_) => {}
        }
    }
    Ok(None)
}

/// The VM in the new process; `None` when it did not come.
async fn arrived(process: &mut VmProcess) -> Result<Option<VmStatus>, CliError> {
    while let Some(reply) = process.reply().await? {
        match reply {
            LaunchReply::Ready(status) | LaunchReply::Ended(status) => return Ok(Some(status)),
            LaunchReply::Failed(_) => return Ok(None),
            LaunchReply::Listening(_) => {}
        }
    }
    Ok(None)
}

fn report(old: &VmStatus, new: &VmStatus, report: Option<&HandOverReport>, printer: &Printer) {
    let value = HandedOver {
        name: &new.name,
        from_pid: old.pid,
        from_program: &old.program,
        pid: new.pid,
        program: &new.program,
        report,
    };
    printer.result(&value, || {
        let head = format!(
            "{}: goes on in process {} (dunlin {}), was in {} (dunlin {})\n",
            new.name, new.pid, new.program, old.pid, old.program
        );
        head + &report.map(describe).unwrap_or_default()
    });
    if report.is_none() {
        printer.note("the old process died at the hand-over; what it held of the console is lost");
    }
}

/// A report for people.
fn describe(report: &HandOverReport) -> String {
    let ms = |value: f64| format!("{value:.2} ms");
    let SwitchOverReport {
        stopped_ms,
        saved_ms,
        sent_ms: _,
        prepared_ms,
        running_ms,
        state_bytes,
    } = report.switch_over.unwrap_or_default();
    let mut facts = vec![
        ["total", &ms(report.total_ms)].map(String::from).to_vec(),
        ["blackout", &report.blackout_ms.map_or("none".into(), ms)]
            .map(String::from)
            .to_vec(),
        vec!["  stopped".into(), ms(stopped_ms)],
        vec![
            "  saved".into(),
            format!("{}, {state_bytes} bytes", ms(saved_ms)),
        ],
        vec!["  prepared".into(), ms(prepared_ms)],
        vec!["  running".into(), ms(running_ms)],
        vec!["built".into(), ms(report.built_ms)],
        vec!["kept".into(), report.descriptors.join(", ")],
    ];
    let taken_back = report.aborted_pauses_ms.len();
    if taken_back > 0 {
        facts.push(vec!["taken back".into(), format!("{taken_back} pauses")]);
    }
    table(&facts)
}
