//! Asks the destination who owns the guest: see [`crate::ownership`].

use std::time::{Duration, Instant};

use crate::error::MigrationError;
use crate::ownership::Doubt;
use crate::protocol::message::{Answer, Ownership, Running, WhoOwns};
use crate::protocol::{Kind, Message, Preamble, ProtocolError, Purpose};
use crate::transport::Connector;
use crate::wire::{Patience, Wire};

/// How long one question may take.
const QUESTION: Duration = Duration::from_secs(3);
/// Between two questions, at first and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// What is known about a guest after `Commit` was written.
#[derive(Debug, Clone, PartialEq)]
pub enum Verdict {
    /// It runs at the destination.
    RunsThere(Running),
    /// It does not run at the destination and never will.
    NeverThere,
    /// Nobody says.
    Unknown,
}

/// Asks until somebody knows, or `until`.
///
/// Use it to look again at a guest that [`crate::MigrationFailure`] left in doubt. After
/// [`Verdict::NeverThere`] the source may resume, after [`Verdict::RunsThere`] it must not.
pub fn resolve(connector: &mut dyn Connector, doubt: &Doubt, until: Instant) -> Verdict {
    let mut pause = FIRST_PAUSE;
    loop {
        match ask(connector, doubt, Closing::Settle) {
            Ok((Answer::Running, running)) => return Verdict::RunsThere(running),
            Ok((Answer::Relinquished, _)) => return Verdict::NeverThere,
            Ok((answer, _)) => tracing::debug!(?answer, "the destination does not know yet"),
            Err(error) => {
                tracing::debug!(error = %error.chain(), "the destination does not answer");
            }
        }
        if connector.peer_is_dead() == Some(true) {
            tracing::warn!("the destination is dead: its guest does not run");
            return Verdict::NeverThere;
        }
        if Instant::now() + pause >= until {
            return Verdict::Unknown;
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// What the source says when it learns that the guest runs at the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Closing {
    /// That nothing is open any more.
    Settle,
    /// Nothing: memory is still to follow.
    Leave,
}

/// Asks once.
pub(crate) fn ask(
    connector: &mut dyn Connector,
    doubt: &Doubt,
    closing: Closing,
) -> Result<(Answer, Running), MigrationError> {
    let deadline = Instant::now() + QUESTION;
    let patience = Patience::Until(deadline);
    let mut wire = Wire::new(connector.connect(deadline)?);
    let preamble = Preamble::connection(Purpose::Inquiry, doubt.token);
    wire.send_preamble(&preamble, patience)?;
    if wire.receive_preamble(patience)? != preamble {
        let reason = "it does not belong to this session";
        return Err(ProtocolError::Preamble { reason }.into());
    }
    let question = WhoOwns {
        incarnation: doubt.incarnation.as_bytes().to_vec(),
    };
    wire.send(&Message::WhoOwns(question), patience)?;
    let Ownership { answer, running } = match wire.receive(patience)? {
        Message::Ownership(body) => body,
        other => {
            return Err(ProtocolError::Unexpected {
                kind: other.kind(),
                state: "waiting for the owner",
            }
            .into());
        }
    };
    let answer = Answer::try_from(answer).unwrap_or(Answer::Unsaid);
    let running = match (answer, running) {
        (Answer::Running, Some(running)) => {
            if closing == Closing::Settle
                && let Err(error) = wire.send(&Message::Settled, patience)
            {
                tracing::debug!(error = %error.chain(), "the destination was not told the end");
            }
            running
        }
        (Answer::Running, None) => {
            let reason = "it lacks what the destination measured";
            return Err(ProtocolError::invalid(Kind::Ownership, reason).into());
        }
        _ => Running::default(),
    };
    wire.shutdown();
    Ok((answer, running))
}
