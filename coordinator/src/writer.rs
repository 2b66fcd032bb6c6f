//! The one task that writes what others wait for: journal entries, what a run trains on, and how it
//! ended; one by one, in their order. It decides nothing: what waits for what is `outgoing`'s matter.

use shard_tools::store::Root;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::core::{Effect, Event};
use crate::error::CoordinatorError;
use crate::journal::{self, Entry, Journal};
use crate::outgoing::is_barrier;
use crate::persist::{Persist, Told};
use crate::{archive, identity};

/// Writes that may wait: one that holds everything back, and entries ahead of need beside it.
const WRITES_MAX: usize = 16;
/// Entries between two prunings.
const PRUNE_EVERY: u64 = 100;

/// Starts the task. It ends when the sender is dropped and all is written, or with what ends the
/// coordinator, and gives the journal back.
pub fn open(journal: Journal, persist: Persist) -> (mpsc::Sender<Effect>, JoinHandle<Journal>) {
    let (writes, mut queue) = mpsc::channel(WRITES_MAX);
    let mut writer = Writer {
        journal,
        persist,
        pruning: None,
    };
    let task = tokio::spawn(async move {
        while let Some(effect) = queue.recv().await {
            if let Err(error) = writer.write(effect).await {
                writer.persist.tell(Told::End(error)).await;
                break;
            }
        }
        if let Some(pruning) = writer.pruning.take() {
            pruning.abort();
        }
        writer.journal
    });
    (writes, task)
}

struct Writer {
    journal: Journal,
    persist: Persist,
    pruning: Option<JoinHandle<()>>,
}

impl Writer {
    async fn write(&mut self, effect: Effect) -> Result<(), CoordinatorError> {
        let holds_back = is_barrier(&effect);
        let root = self.journal.root().clone();
        let event = match effect {
            Effect::Journal {
                generation,
                committed,
                horizon,
                members,
                quarantine,
                ..
            } => {
                let quarantine = quarantine.into_iter().map(Into::into).collect();
                let entry = Entry {
                    generation,
                    committed,
                    horizon,
                    members,
                    quarantine,
                    ..self.journal.next()
                };
                Some(self.append(&root, entry).await?)
            }
            Effect::StoreData(data) => {
                let put = || identity::put(&root, &data);
                self.persist.until_done(identity::DATA_FILE, put).await?;
                None
            }
            Effect::StoreEvaluation(evaluated) => {
                let what = archive::evaluation_file(evaluated.step);
                let put = || archive::put_evaluation(&root, &evaluated);
                let differs = self.persist.until_done(&what, put).await?;
                differs.map(|how| Event::StoreDiffers { what, how })
            }
            Effect::StoreResult {
                exported,
                last,
                evaluations,
            } => {
                let put = || archive::put_result(&root, &exported, last.as_ref(), &evaluations);
                self.persist.until_done(archive::RESULT_FILE, put).await?;
                None
            }
            other => {
                tracing::error!(?other, "no write; a fault of this program");
                None
            }
        };
        if holds_back {
            self.persist.tell(Told::Settled(event)).await;
        } else if let Some(event) = event {
            self.persist.tell(Told::Event(event)).await;
        }
        Ok(())
    }

    async fn append(&mut self, root: &Root, entry: Entry) -> Result<Event, CoordinatorError> {
        let seq = entry.seq;
        let what = format!("journal entry {seq}");
        let put = || journal::put(root, &entry);
        self.persist.until_done(&what, put).await?;
        self.journal.settled(entry);
        self.prune(root, seq);
        Ok(Event::Journaled { seq })
    }

    /// Old entries go in the background; that they cannot harms nothing.
    fn prune(&mut self, root: &Root, seq: u64) {
        let busy = self
            .pruning
            .as_ref()
            .is_some_and(|task| !task.is_finished());
        if seq.is_multiple_of(PRUNE_EVERY) && !busy {
            let root = root.clone();
            self.pruning = Some(tokio::spawn(async move {
                if let Err(error) = journal::prune(&root).await {
                    tracing::warn!(%error, "old journal entries stay for now");
                }
            }));
        }
    }
}
