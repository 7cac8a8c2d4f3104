//! Arguments of `switch`.

use std::path::PathBuf;

use clap::Args;

/// Arguments of `switch`.
#[derive(Debug, Args)]
pub struct SwitchArgs {
    /// Configuration file (JSON); the options below add to it
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Name, shown in logs and answers
    #[arg(long)]
    pub name: Option<String>,
    /// Control socket
    #[arg(long, value_name = "SOCKET")]
    pub control: Option<PathBuf>,
    /// Port for a VM: a unix datagram socket to make; repeat for more
    #[arg(long = "port", value_name = "SOCKET")]
    pub ports: Vec<PathBuf>,
    /// Tunnel to other switches: own address, then the others', separated by commas
    #[arg(long, value_name = "LOCAL,REMOTE...")]
    pub tunnel: Option<String>,
    /// VXLAN network identifier of the tunnel
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub vni: u32,
    /// Gateway with DHCP for guests: its address and prefix, such as 10.0.2.1/24
    #[arg(long, value_name = "ADDRESS/PREFIX")]
    pub gateway: Option<String>,
    /// TCP port of the host that leads to a guest, such as 127.0.0.2:8080=10.0.2.15:80
    #[arg(long = "forward", value_name = "LISTEN=GUEST", requires = "gateway")]
    pub forwards: Vec<String>,
}
