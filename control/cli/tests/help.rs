//! What `--help` says, held in `snapshots/help.txt`. `UPDATE_SNAPSHOTS=1 cargo test` rewrites it.

use std::path::Path;

use clap::CommandFactory;
use dunlin_cli::args::Arguments;

#[test]
fn help_says_what_the_snapshot_says() {
    let mut command = Arguments::command().term_width(100);
    command.build();
    let mut text = command.render_help().to_string();
    for sub in command.get_subcommands_mut() {
        if sub.is_hide_set() || sub.get_name() == "help" {
            continue;
        }
        let name = sub.get_name().to_owned();
        text.push_str(&format!("\n──── {name}\n{}", sub.render_help()));
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/snapshots/help.txt");
    if std::env::var_os("UPDATE_SNAPSHOTS").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap();
    for (number, (now, then)) in text.lines().zip(expected.lines()).enumerate() {
        assert_eq!(now, then, "line {} of {}", number + 1, path.display());
    }
    assert_eq!(text.lines().count(), expected.lines().count());
}

#[test]
fn every_command_and_argument_is_described() {
    let command = Arguments::command();
    for sub in command.get_subcommands() {
        assert!(sub.get_about().is_some(), "{}", sub.get_name());
        for argument in sub.get_arguments() {
            assert!(
                argument.get_help().is_some(),
                "{} {}",
                sub.get_name(),
                argument.get_id()
            );
        }
    }
}
