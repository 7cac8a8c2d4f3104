//! The word that decides who owns the guest: see [`crate::ownership`].

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::options::CancelToken;
use crate::protocol::Token;
use crate::protocol::message::{Answer, Running};

/// Sessions that are remembered. Forgetting an old relinquished one is safe: a source that was
/// told so, or that resumed without asking, never writes its `Commit`.
const REMEMBERED: usize = 256;

/// Custody of one session's guest. The transitions are drawn in [`crate::ownership`].
#[derive(Debug, Clone, PartialEq)]
enum Custody {
    Offered,
    Owned,
    Running(Running),
    Relinquished,
}

#[derive(Debug)]
struct Entry {
    token: Token,
    custody: Custody,
    /// Ends the session's waits when the guest is relinquished under it.
    stop: CancelToken,
}

/// Custody of every session that this destination process has heard of.
#[derive(Debug, Clone)]
pub(crate) struct Ledger(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    incarnation: Token,
    entries: Mutex<VecDeque<Entry>>,
    changed: Condvar,
}

impl Ledger {
    pub(crate) fn new(incarnation: Token) -> Self {
        Self(Arc::new(Inner {
            incarnation,
            entries: Mutex::new(VecDeque::new()),
            changed: Condvar::new(),
        }))
    }

    pub(crate) fn incarnation(&self) -> Token {
        self.0.incarnation
    }

    /// A session begins. `None`: its token was seen before, so it may not.
    pub(crate) fn offer(&self, token: Token) -> Option<CancelToken> {
        let mut entries = self.entries();
        if entries.iter().any(|entry| entry.token == token) {
            return None;
        }
        let stop = CancelToken::new();
        Self::remember(
            &mut entries,
            Entry {
                token,
                custody: Custody::Offered,
                stop: stop.clone(),
            },
        );
        Some(stop)
    }

    /// `Commit` came: true when the guest is owned here from now on.
    pub(crate) fn commit(&self, token: Token) -> bool {
        self.step(token, &Custody::Offered, Custody::Owned)
    }

    /// The guest was started.
    pub(crate) fn running(&self, token: Token, body: Running) {
        self.step(token, &Custody::Owned, Custody::Running(body));
    }

    /// The session ended, or the guest did not start.
    pub(crate) fn relinquish(&self, token: Token) {
        if !self.step(token, &Custody::Offered, Custody::Relinquished) {
            self.step(token, &Custody::Owned, Custody::Relinquished);
        }
    }

    /// Answers a source, and takes the decision if it was not taken yet. Waits up to `patience`
    /// for a guest that is being started.
    pub(crate) fn ask(
        &self,
        token: Token,
        incarnation: Token,
        patience: Duration,
    ) -> (Answer, Option<Running>) {
        let deadline = Instant::now() + patience;
        let mut entries = self.entries();
        loop {
            let Some(entry) = entries.iter_mut().find(|entry| entry.token == token) else {
                if incarnation != self.0.incarnation {
                    return (Answer::Unknown, None);
                }
                let entry = Entry {
                    token,
                    custody: Custody::Relinquished,
                    stop: CancelToken::new(),
                };
                Self::remember(&mut entries, entry);
                return (Answer::Relinquished, None);
            };
            match &entry.custody {
                Custody::Running(body) => return (Answer::Running, Some(body.clone())),
                Custody::Relinquished => return (Answer::Relinquished, None),
                Custody::Offered => {
                    entry.custody = Custody::Relinquished;
                    entry.stop.cancel();
                    return (Answer::Relinquished, None);
                }
                Custody::Owned => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return (Answer::Starting, None);
                    }
                    entries = self
                        .0
                        .changed
                        .wait_timeout(entries, left)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0;
                }
            }
        }
    }

    fn step(&self, token: Token, from: &Custody, to: Custody) -> bool {
        let mut entries = self.entries();
        let found = entries
            .iter_mut()
            .find(|entry| entry.token == token && entry.custody == *from);
        let stepped = found.is_some();
        if let Some(entry) = found {
            entry.custody = to;
        }
        self.0.changed.notify_all();
        stepped
    }

    fn remember(entries: &mut VecDeque<Entry>, entry: Entry) {
        while entries.len() >= REMEMBERED {
            let old = entries
                .iter()
                .position(|entry| entry.custody == Custody::Relinquished);
            let Some(old) = old else { break };
            entries.remove(old);
        }
        entries.push_back(entry);
    }

    /// The entries are whole between any two statements, so a poisoned lock is as good as any.
    fn entries(&self) -> MutexGuard<'_, VecDeque<Entry>> {
        self.0
            .entries
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKEN: Token = Token::from_bytes([1; 16]);
    const US: Token = Token::from_bytes([2; 16]);
    const NOW: Duration = Duration::ZERO;

    #[test]
    fn a_commit_after_the_question_finds_the_guest_relinquished() {
        let ledger = Ledger::new(US);
        let stop = ledger.offer(TOKEN).unwrap();
        assert_eq!(ledger.ask(TOKEN, US, NOW).0, Answer::Relinquished);
        assert!(stop.is_cancelled());
        assert!(!ledger.commit(TOKEN));
    }

    #[test]
    fn a_question_after_the_commit_finds_the_guest_owned() {
        let ledger = Ledger::new(US);
        ledger.offer(TOKEN).unwrap();
        assert!(ledger.commit(TOKEN));
        assert_eq!(ledger.ask(TOKEN, US, NOW).0, Answer::Starting);
        ledger.running(TOKEN, Running::default());
        assert_eq!(ledger.ask(TOKEN, US, NOW).0, Answer::Running);
        ledger.relinquish(TOKEN);
        assert_eq!(ledger.ask(TOKEN, US, NOW).0, Answer::Running);
    }

    #[test]
    fn a_guest_that_did_not_start_is_given_back() {
        let ledger = Ledger::new(US);
        ledger.offer(TOKEN).unwrap();
        assert!(ledger.commit(TOKEN));
        ledger.relinquish(TOKEN);
        assert_eq!(ledger.ask(TOKEN, US, NOW).0, Answer::Relinquished);
    }

    #[test]
    fn a_token_serves_once() {
        let ledger = Ledger::new(US);
        assert_eq!(ledger.ask(TOKEN, US, NOW).0, Answer::Relinquished);
        assert!(ledger.offer(TOKEN).is_none());
    }

    #[test]
    fn another_process_promises_nothing() {
        let ledger = Ledger::new(US);
        assert_eq!(ledger.ask(TOKEN, TOKEN, NOW).0, Answer::Unknown);
    }

    #[test]
    fn memory_of_sessions_is_bounded_and_keeps_what_runs() {
        let ledger = Ledger::new(US);
        ledger.offer(TOKEN).unwrap();
        assert!(ledger.commit(TOKEN));
        for n in 0..1000u128 {
            let token = Token::from_bytes((n << 64).to_le_bytes());
            ledger.offer(token).unwrap();
            ledger.relinquish(token);
        }
        assert!(ledger.entries().len() <= REMEMBERED);
        assert_eq!(ledger.ask(TOKEN, US, NOW).0, Answer::Starting);
    }
}
