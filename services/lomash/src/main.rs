//! The `lomash` binary: parses the command line and runs the command.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use lomash::{
    backup, bench, cluster, demo, dlq, import, mail_sink, orders, rebuild, reconcile, replay, restore, status, streams,
    token, up, verify,
};
use lomash_platform::telemetry::{self, LogFormat};

/// As in the product service: reading a whole ledger is what this program does for long (ADR 0029).
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Lomash Inventory: stock that is never oversold, lost or double-counted.
#[derive(Debug, Parser)]
#[command(name = "lomash", version)]
struct Cli {
    /// How log lines look.
    #[arg(long, env = "LOG_FORMAT", value_enum, default_value_t = LogFormat::Pretty, global = true)]
    log_format: LogFormat,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start NATS, Postgres, Redis, a mail server and the services on this machine, until Ctrl-C.
    Up(up::UpArgs),
    /// Start three NATS nodes with TLS and identities, and the services against them; `--check` kills them under load.
    Cluster(cluster::ClusterArgs),
    /// Show the whole way of orders on real servers, check every number, and end.
    Demo(demo::DemoArgs),
    /// Import a catalogue of products.
    Import(import::ImportArgs),
    /// Publish orders from a file.
    #[command(subcommand)]
    Orders(orders::OrdersCommand),
    /// Check the whole ledger and its projection.
    Verify(verify::VerifyArgs),
    /// Build the projection anew from the stream, beside the live one, and swap them.
    Rebuild(rebuild::RebuildArgs),
    /// Correct the stock by the counts of the warehouse.
    Reconcile(reconcile::ReconcileArgs),
    /// Look through dead letters, bring their messages back, or remove them.
    #[command(subcommand)]
    Dlq(dlq::DlqCommand),
    /// Measure this system beside its rivals and the limit of the server.
    Bench(bench::BenchArgs),
    /// Replay stored messages to standard output, a file or a subject.
    Replay(replay::ReplayArgs),
    /// Write the streams into an archive, or what came since; `--check` proves its hashes.
    Backup(backup::BackupArgs),
    /// Restore an archive into empty servers, and prove that it is equal.
    Restore(restore::RestoreArgs),
    /// Compare streams and consumers with their definitions, and bring them to it.
    #[command(subcommand)]
    Streams(streams::StreamsCommand),
    /// Show streams, consumers, lag and checkpoints.
    Status(status::StatusArgs),
    /// Keep mails as files instead of delivering them; `up` starts it.
    #[command(hide = true)]
    MailSink(mail_sink::MailSinkArgs),
    /// Mint a bearer token for development.
    Token(token::TokenArgs),
}

#[tokio::main]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    #[cfg(feature = "failpoints")]
    let _crash_points = lomash_ledger::fail::FailScenario::setup();
    let telemetry = telemetry::start("lomash", cli.log_format, telemetry::COMMAND_FILTER);
    let outcome = match cli.command {
        Command::Up(args) => up::run(args).await.map(|()| ExitCode::SUCCESS),
        Command::Cluster(args) => cluster::run(args).await,
        Command::Demo(args) => demo::run(args).await,
        Command::Import(args) => import::run(args).await,
        Command::Orders(command) => orders::run(command).await.map(|()| ExitCode::SUCCESS),
        Command::Verify(args) => verify::run(args).await,
        Command::Rebuild(args) => rebuild::run(args).await,
        Command::Reconcile(args) => reconcile::run(args).await,
        Command::Dlq(command) => dlq::run(command).await,
        Command::Bench(args) => bench::run(args).await,
        Command::Replay(args) => replay::run(args).await,
        Command::Backup(args) => backup::run(args).await,
        Command::Restore(args) => restore::run(args).await,
        Command::Streams(command) => streams::run(command).await,
        Command::Status(args) => status::run(args).await,
        Command::MailSink(args) => mail_sink::run(args).await.map(|()| ExitCode::SUCCESS),
        Command::Token(args) => token::run(&args).map(|()| ExitCode::SUCCESS),
    };
    telemetry.stop().await;
    outcome.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}
