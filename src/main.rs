//! `belfry`: one binary, its roles are subcommands.

mod answer;
mod audit;
mod bench;
mod checkpoint;
mod eval;
mod files;
mod inspect;
mod plan;
mod rehearse;
mod resolve;
mod roles;
mod run;
mod size;
mod stages;
mod status;
mod synthetic;
mod trained;
mod weights;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Trains ManagerTower on many machines: the same bits at any worker count and after any crash.
#[derive(Parser)]
#[command(version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Train on this machine: starts a coordinator and workers and watches over them. Of a plan all
    /// stages, in their order, and a table of results at the end.
    ///
    /// Example: belfry run configs/quickstart.toml --workers 2
    Run(run::RunArguments),
    /// Lead a run: what `belfry run` and the cluster's jobs start.
    Coordinator(roles::CoordinatorArguments),
    /// Work for a run: one process per device.
    Worker(roles::WorkerArguments),
    /// Show how a run or a plan stands: phase, workers, times, checkpoints, the last decisions and
    /// their reasons; what its root knows when nobody leads.
    ///
    /// Example: belfry status --local runs/quickstart
    Status(status::StatusArguments),
    /// Schedule a plan: what `belfry run PLAN.toml` starts, and one process of a cluster. It gives the
    /// workers of all agents to the stages of its queue.
    ///
    /// Example: belfry scheduler configs/plan-paper.toml --root s3://belfry/paper --listen 0.0.0.0:7100
    Scheduler(stages::SchedulerArguments),
    /// Offer this host's devices to a plan: one process per host.
    ///
    /// Example: belfry agent --scheduler lead:7100 --root s3://belfry/paper --slots 8
    Agent(stages::AgentArguments),
    /// Put a run or the stages of a plan into the queue of a running scheduler.
    ///
    /// Example: belfry submit configs/vqav2.toml --to lead:7100
    Submit(stages::SubmitArguments),
    /// Take a stage out of a plan, or end it; what comes after it is cancelled too.
    ///
    /// Example: belfry cancel vqav2 --to lead:7100
    Cancel(stages::CancelArguments),
    /// Show what the processes of a stage said on this host.
    ///
    /// Example: belfry logs pretrain --root runs/paper --follow
    Logs(stages::LogsArguments),
    /// End a run in good order: the open step is finished and a checkpoint written first.
    ///
    /// Example: belfry drain --local runs/quickstart
    Drain(status::DrainArguments),
    /// Pack, check and list shards.
    Shards {
        #[command(subcommand)]
        command: shard_tools::cli::Command,
    },
    /// Gather published or trained weights into one file with the authors' names.
    ///
    /// Example: belfry import --from roberta.safetensors --from clip.pt --to init.safetensors
    /// configs/pretrain-4m.toml
    Import(weights::ImportArguments),
    /// Write a checkpoint's weights as one safetensors file that PyTorch loads.
    Export(weights::ExportArguments),
    /// Look at what trained managers do: average aggregation weights and similarity of neighbours, as
    /// figures and tables.
    ///
    /// Example: belfry inspect runs/quickstart --to inspect
    Inspect(inspect::InspectArguments),
    /// Judge a trained model on packed data: accuracies, the VQA server's result file, recalls. Given
    /// again with the same --to it goes on where it was interrupted.
    ///
    /// Example: belfry eval --run runs/vqav2 --best vqa_score --workers 4 --to evaluation
    Eval(Box<eval::EvalArguments>),
    /// Ask a model trained for VQA about an image: the likeliest answers with their scores.
    ///
    /// Example: belfry ask --run runs/vqav2 --image dog.jpg --question "What colour is the dog?"
    Ask(Box<answer::AskArguments>),
    /// How well captions match an image, best first.
    ///
    /// Example: belfry match --run runs/flickr30k --image dog.jpg --caption "a dog" --caption "a cat"
    Match(Box<answer::MatchArguments>),
    /// Find images of a folder by a text, or captions of it by an image.
    ///
    /// Example: belfry retrieve --run runs/flickr30k --index photos --query "a dog on a beach"
    Retrieve(Box<answer::RetrieveArguments>),
    /// Prove from a run's ledger which pairs were trained: every pair of each completed epoch exactly
    /// once, or by name what was not. Exit code 1: not proved; 2: nothing to prove from.
    ///
    /// Example: belfry audit --run runs/quickstart
    Audit(audit::AuditArguments),
    /// List, verify and prune the checkpoints of a run.
    Checkpoint {
        #[command(subcommand)]
        command: checkpoint::Command,
    },
    /// Measure this machine: each figure beside its floor, measured in the same run.
    ///
    /// Example: belfry bench step configs/quickstart.toml
    Bench {
        #[command(subcommand)]
        bench: bench::Bench,
    },
    /// Count a model: parameters, FLOPs, training memory.
    Model(size::ModelArguments),
    /// Say what a run will take before it starts: batch, workers, network, disk, memory, time.
    ///
    /// Example: belfry plan configs/pretrain-4m.toml --workers 16,32,64 --step-seconds 3.1@16
    Plan(plan::PlanArguments),
    /// Run the run's coordinator and workers through simulated failures: goodput, stalls, checkpoint
    /// traffic and what the store costs, before money is spent.
    ///
    /// Example: belfry rehearse configs/pretrain-4m.toml --workers 64 --mtbf 10m --hours 24
    Rehearse(rehearse::RehearseArguments),
    /// Print the resolved configuration and its hash, and check it.
    Config {
        /// The run file.
        config: PathBuf,
        /// Override a key; may be repeated.
        #[arg(long = "set", value_name = "KEY=VALUE")]
        settings: Vec<String>,
    },
}

/// Exit code of an audit or a verification that found a fault.
const NOT_PROVED: u8 = 1;
/// Exit code of an error that starting again does not mend.
const FATAL: u8 = 2;
/// Exit code of a process that ends because another goes on, or may.
const ASIDE: u8 = 3;

fn main() -> ExitCode {
    let command = Arguments::parse().command;
    let trains = match &command {
        Command::Worker(_) => true,
        Command::Bench { bench } => bench.trains(),
        _ => false,
    };
    if trains {
        belfry_worker::memory::keep_freed();
    }
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: cannot start threads: {error}");
            return ExitCode::from(FATAL);
        }
    };
    let code = runtime.block_on(run(command));
    // A role that follows its standard input still reads it on a thread: nobody waits for that.
    runtime.shutdown_background();
    code
}

async fn run(command: Command) -> ExitCode {
    let result = match command {
        Command::Run(arguments) => crate::run::run(arguments).await,
        Command::Coordinator(arguments) => roles::coordinator(arguments).await,
        Command::Worker(arguments) => roles::worker(arguments).await,
        Command::Status(arguments) => status::status(arguments).await,
        Command::Scheduler(arguments) => stages::scheduler(arguments).await,
        Command::Agent(arguments) => stages::agent(arguments).await,
        Command::Submit(arguments) => stages::submit(arguments).await,
        Command::Cancel(arguments) => stages::cancel(arguments).await,
        Command::Logs(arguments) => stages::logs(arguments).await,
        Command::Drain(arguments) => status::drain(arguments).await,
        Command::Shards { command } => shard_tools::cli::run(command).await,
        Command::Import(arguments) => weights::import(arguments).await,
        Command::Export(arguments) => weights::export(arguments).await,
        Command::Inspect(arguments) => inspect::inspect(arguments).await,
        Command::Eval(arguments) => eval::eval(*arguments).await,
        Command::Ask(arguments) => answer::ask(*arguments).await,
        Command::Match(arguments) => answer::match_captions(*arguments).await,
        Command::Retrieve(arguments) => answer::retrieve(*arguments).await,
        Command::Audit(arguments) => match audit::audit(arguments).await {
            Ok(false) => return ExitCode::from(NOT_PROVED),
            proved => proved.map(drop),
        },
        Command::Checkpoint { command } => match checkpoint::run(command).await {
            Ok(false) => return ExitCode::from(NOT_PROVED),
            right => right.map(drop),
        },
        Command::Bench { bench } => bench::run(bench).await,
        Command::Plan(arguments) => plan::plan(arguments).await,
        Command::Rehearse(arguments) => {
            tokio::task::block_in_place(|| rehearse::rehearse(&arguments))
        }
        Command::Model(arguments) => size::print(&arguments),
        Command::Config { config, settings } => print_config(&config, &settings).await,
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", told(&error));
            let aside = error.is::<roles::Aside>();
            ExitCode::from(if aside { ASIDE } else { FATAL })
        }
    }
}

/// The error with its causes, but for those that it tells itself.
fn told(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if !text.contains(&cause) {
            let separator = if text.is_empty() { "" } else { ": " };
            text = text + separator + &cause;
        }
    }
    text
}

async fn print_config(config: &std::path::Path, settings: &[String]) -> anyhow::Result<()> {
    let config = belfry_configs::load(config, settings)?;
    let unresolved = config.clone();
    let (config, told) = match resolve::length::resolve(config).await {
        Ok(config) => {
            let told = resolve::length::told(&config);
            (config, told)
        }
        Err(error) => (unresolved, Some(format!("unknown: {}", told(&error)))),
    };
    print!("{}", config.to_toml());
    if let Some(told) = told {
        println!("# steps: {}", told.replace('\n', " "));
    }
    if let Some(run) = config
        .init
        .run
        .as_ref()
        .filter(|_| config.needs_beginning())
    {
        println!("# begins with a checkpoint of {run} that is chosen when the run starts");
    }
    println!("# sha256 {}", config.sha256());
    Ok(())
}
