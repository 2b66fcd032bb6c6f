//! Writes that are repeated until they are durable: a store that errs or does not answer delays
//! them, for as long as it takes, and ends nothing. It refuses to know what is written.

use std::future::Future;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

use crate::core::Event;
use crate::error::CoordinatorError;

const BACK_OFF_MIN: Duration = Duration::from_millis(50);
/// A store that is back is noticed within this time.
const BACK_OFF_MAX: Duration = Duration::from_secs(1);
/// One try's time doubles up to this: slow is not dead.
const TRY_MAX: Duration = Duration::from_secs(60);

/// What the tasks that write tell the shell's loop.
pub enum Told {
    /// Something for the core.
    Event(Event),
    /// The write that held everything else back is durable.
    Settled(Option<Event>),
    /// The coordinator cannot go on.
    End(CoordinatorError),
}

/// How writes are repeated, and who hears of it.
#[derive(Clone)]
pub struct Persist {
    tell: Option<mpsc::Sender<Told>>,
    /// Time of the first try.
    patience: Duration,
}

impl Persist {
    /// Before the core is there: troubles go to the log, and what a user must mend ends the start.
    pub fn starting(patience: Duration) -> Self {
        let tell = None;
        Persist { tell, patience }
    }

    /// While the run goes on: the core hears of troubles, and none of the store's ends it.
    pub fn running(patience: Duration, tell: mpsc::Sender<Told>) -> Self {
        let tell = Some(tell);
        Persist { tell, patience }
    }

    /// Tells the loop; one that has ended needs to hear nothing.
    pub async fn tell(&self, told: Told) {
        if let Some(tell) = &self.tell {
            let _ = tell.send(told).await;
        }
    }

    /// Repeats `attempt` until it is done. It must be harmless to repeat, also where an earlier try
    /// that was given up lands late.
    ///
    /// # Errors
    /// What is no trouble of the store; at the start also what only a user can mend.
    pub async fn until_done<T, F>(
        &self,
        what: &str,
        attempt: impl Fn() -> F,
    ) -> Result<T, CoordinatorError>
    where
        F: Future<Output = Result<T, CoordinatorError>>,
    {
        let (mut time, mut back_off) = (self.patience, BACK_OFF_MIN);
        let mut away = false;
        loop {
            let error = match timeout(time, attempt()).await {
                Ok(Ok(done)) => {
                    if away {
                        self.say_back(what).await;
                    }
                    return Ok(done);
                }
                Ok(Err(error)) if self.may_pass(&error) => error.to_string(),
                Ok(Err(error)) => return Err(error),
                Err(_) => {
                    let error = format!("no answer within {:.1} s", time.as_secs_f64());
                    time = (time * 2).min(TRY_MAX);
                    error
                }
            };
            if !away {
                away = true;
                self.say_away(what, error).await;
            }
            sleep(back_off).await;
            back_off = (back_off * 2).min(BACK_OFF_MAX);
        }
    }

    fn may_pass(&self, error: &CoordinatorError) -> bool {
        match error {
            CoordinatorError::Store { source, .. } => self.tell.is_some() || source.may_pass(),
            _ => false,
        }
    }

    async fn say_away(&self, what: &str, error: String) {
        tracing::warn!(
            what,
            error,
            "the store cannot do it yet; trying until it can"
        );
        let what = what.to_owned();
        self.tell(Told::Event(Event::StoreAway { what, error }))
            .await;
    }

    async fn say_back(&self, what: &str) {
        tracing::info!(what, "the store can again");
        let what = what.to_owned();
        self.tell(Told::Event(Event::StoreBack { what })).await;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;
    use shard_tools::store::Root;

    fn corrupt() -> CoordinatorError {
        CoordinatorError::Corrupt {
            file: "f".into(),
            reason: "r".into(),
        }
    }

    /// The error of a store that lacks something: it may not pass, and is waited for in a run.
    async fn lacking() -> CoordinatorError {
        let root = Root::open("memory://").expect("opens");
        let error = root.get("nothing").await.expect_err("is not there");
        CoordinatorError::store("cannot read it", error)
    }

    #[tokio::test]
    async fn it_is_tried_until_done_and_said_once() {
        let (tell, mut told) = mpsc::channel(8);
        let persist = Persist::running(Duration::from_millis(100), tell);
        let tries = AtomicU32::new(0);
        let attempt = || async {
            match tries.fetch_add(1, Ordering::Relaxed) {
                0 | 2 => std::future::pending().await,
                1 => Err(lacking().await),
                _ => Ok(7),
            }
        };
        assert_eq!(persist.until_done("it", attempt).await.expect("is"), 7);
        assert_eq!(tries.load(Ordering::Relaxed), 4);
        let Some(Told::Event(Event::StoreAway { what, error })) = told.recv().await else {
            panic!("it was away")
        };
        assert_eq!(
            (what.as_str(), error.as_str()),
            ("it", "no answer within 0.1 s")
        );
        let back = told.recv().await;
        assert!(matches!(back, Some(Told::Event(Event::StoreBack { .. }))));
        drop(persist);
        assert!(told.recv().await.is_none());
    }

    #[tokio::test]
    async fn what_is_no_trouble_of_the_store_ends_it() {
        let (tell, _told) = mpsc::channel(8);
        let running = Persist::running(Duration::from_secs(3), tell);
        let attempt = || async { Err::<(), _>(corrupt()) };
        assert!(running.until_done("it", attempt).await.is_err());
        let starting = Persist::starting(Duration::from_secs(3));
        let attempt = || async { Err::<(), _>(lacking().await) };
        assert!(starting.until_done("it", attempt).await.is_err());
    }
}
