//! `switch`: this process is a virtual switch.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::Path;

use dunlin_api::{ApiError, ErrorCode};
use serde_json::{Map, Value, json};

use super::absolute;
use crate::args::SwitchArgs;
use crate::error::CliError;
use crate::host::Host;
use crate::printer::Printer;
use crate::terminal::Interrupts;

/// Runs a switch until a signal ends it.
pub(super) fn switch(args: SwitchArgs, printer: &Printer, host: &dyn Host) -> Result<(), CliError> {
    let config = configuration(args)?;
    let ports: Vec<Value> = (config["ports"].as_array().into_iter().flatten())
        .map(|port| port["name"].clone())
        .collect();
    let name = config["name"].clone();
    let stop = readable_when_interrupted()?;
    host.run_switch(&config.to_string(), stop, &mut || {
        printer.result(&json!({ "switch": name, "ports": ports }), String::new);
        let count = ports.len();
        printer.note(&format!(
            "switch {name} runs with {count} ports; Ctrl-C ends it"
        ));
    })?;
    Ok(())
}

/// A descriptor that becomes readable at the first signal that asks this process to end.
fn readable_when_interrupted() -> Result<OwnedFd, CliError> {
    let listening = || CliError::host("listen for signals");
    let (stop, signal) = std::io::pipe().map_err(listening())?;
    // A runtime of its own: the command's is busy with the switch.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(listening())?;
    let mut interrupts = {
        let _guard = runtime.enter();
        Interrupts::listen()?
    };
    let wait = move || {
        let mut signal = signal;
        runtime.block_on(interrupts.next());
        let _switch_has_ended = signal.write_all(&[0]);
    };
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(wait)
        .map_err(listening())?;
    Ok(stop.into())
}

/// The file's configuration with what the options add.
fn configuration(args: SwitchArgs) -> Result<Value, CliError> {
    let mut config = match &args.config {
        Some(path) => read(path)?,
        None => Map::new(),
    };
    if let Some(name) = args.name {
        config.insert("name".into(), name.into());
    }
    config.entry("name").or_insert_with(|| "switch".into());
    if let Some(control) = args.control {
        config.insert("control".into(), json!(absolute(&control)?));
    }
    let ports = config.entry("ports").or_insert_with(|| json!([]));
    let Some(ports) = ports.as_array_mut() else {
        return Err(CliError::Argument(
            "\"ports\" in the switch's configuration is no list".into(),
        ));
    };
    for path in args.ports {
        let path = absolute(&path)?;
        let name = path
            .file_stem()
            .map(|stem| stem.to_string_lossy().into_owned());
        ports.push(json!({ "name": name, "kind": { "unix": { "path": path } } }));
    }
    if let Some(text) = args.tunnel {
        let mut addresses = text.split(',');
        let local = addresses.next();
        let remotes: Vec<&str> = addresses.collect();
        let tunnel = json!({ "local": local, "remotes": remotes, "vni": args.vni });
        ports.push(json!({ "name": "tunnel", "kind": { "tunnel": tunnel } }));
    }
    if let Some(text) = args.gateway {
        ports.push(gateway(&text, &args.forwards)?);
    }
    if ports.is_empty() && config.get("control").is_none() {
        return Err(ApiError::new(ErrorCode::InvalidRequest, "the switch has no port")
            .with_hint("add one: --port SOCKET, --tunnel LOCAL,REMOTE, --gateway ADDRESS/PREFIX, or a configuration file")
            .into());
    }
    Ok(config.into())
}

fn read(path: &Path) -> Result<Map<String, Value>, CliError> {
    let reading = || {
        CliError::host(format!(
            "read the switch's configuration \"{}\"",
            path.display()
        ))
    };
    let text = std::fs::read_to_string(path).map_err(reading())?;
    serde_json::from_str(&text)
        .map_err(std::io::Error::other)
        .map_err(reading())
}

/// A gateway whose DHCP pool is the subnet from its fifteenth address on.
fn gateway(text: &str, forwards: &[String]) -> Result<Value, CliError> {
    let bad = || {
        CliError::Argument(format!(
            "\"{text}\" is no address with prefix such as 10.0.2.1/24"
        ))
    };
    let (address, prefix) = text.split_once('/').ok_or_else(bad)?;
    let address: std::net::Ipv4Addr = address.parse().ok().ok_or_else(bad)?;
    let prefix: u32 = prefix
        .parse()
        .ok()
        .filter(|p| (8..=27).contains(p))
        .ok_or_else(bad)?;
    let mask = u32::MAX << (32 - prefix);
    let network = u32::from(address) & mask;
    let first = std::net::Ipv4Addr::from(network + 15);
    let last = std::net::Ipv4Addr::from((network | !mask) - 1);
    let forwards = forwards
        .iter()
        .map(|text| forward(text))
        .collect::<Result<Vec<_>, _>>()?;
    let [_, b, c, d] = address.octets();
    Ok(json!({ "name": "gateway", "kind": { "gateway": {
        "mac": format!("02:00:00:{b:02x}:{c:02x}:{d:02x}"),
        "address": address,
        "prefix": prefix,
        "dhcp": { "first": first, "last": last },
        "forwards": forwards,
    }}}))
}

fn forward(text: &str) -> Result<Value, CliError> {
    let (listen, to) = text.split_once('=').ok_or_else(|| {
        CliError::Argument(format!(
            "\"{text}\" is no forward such as 127.0.0.2:8080=10.0.2.15:80"
        ))
    })?;
    Ok(json!({ "listen": listen, "to": to }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gateway_serves_its_subnet() {
        let port = gateway("10.0.2.1/24", &["127.0.0.2:80=10.0.2.15:7".into()]).unwrap();
        let gateway = &port["kind"]["gateway"];
        assert_eq!(gateway["dhcp"]["first"], "10.0.2.15");
        assert_eq!(gateway["dhcp"]["last"], "10.0.2.254");
        assert_eq!(gateway["forwards"][0]["to"], "10.0.2.15:7");
        for bad in ["10.0.2.1", "10.0.2.1/31", "x/24"] {
            assert!(super::gateway(bad, &[]).is_err(), "{bad}");
        }
    }
}
