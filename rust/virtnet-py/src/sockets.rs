//! Opens the ports that stand on sockets of the host: VXLAN, datagrams, connections. Each may be in another network namespace.

use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::net::SocketAddr;
use std::time::Duration;

use virtnet_ports::{
    Control, DgramPort, Endpoint, PortError, StreamPort, VXLAN_PORT, VxlanOptions, VxlanPort,
    in_network_namespace,
};

use crate::errors::{ConfigError, port_error};
use crate::open::{Opened, Watch, get};

/// Does `work`, without the interpreter, in the network namespace that the options name.
pub(crate) fn there<R: Send>(
    options: &Bound<'_, PyDict>,
    work: impl FnOnce() -> Result<R, PortError> + Send,
) -> PyResult<R> {
    let namespace: Option<String> = get(options, "netns")?;
    options
        .py()
        .detach(|| in_network_namespace(namespace.as_deref(), work).map_err(PortError::from)?)
        .map_err(port_error)
}

pub(crate) fn open_vxlan(options: &Bound<'_, PyDict>) -> PyResult<Opened> {
    let local = address(&get::<String>(options, "where")?)?;
    let remotes: Vec<String> = get(options, "remotes")?;
    let remotes = remotes.iter().map(|remote| address(remote));
    let wanted = VxlanOptions {
        learn: get(options, "learn")?,
        ageing: Duration::from_secs(get(options, "ageing_s")?),
        anyone: get(options, "anyone")?,
        source_ports: get(options, "source_ports")?,
        ..VxlanOptions::new(
            local,
            get(options, "vni")?,
            remotes.collect::<PyResult<_>>()?,
        )
    };
    let port = there(options, || VxlanPort::open(&wanted))?;
    let watch = Watch::Vxlan(port.watch());
    Ok(Opened::whole(port, watch))
}

pub(crate) fn open_dgram(options: &Bound<'_, PyDict>) -> PyResult<Opened> {
    let [local, remote] = ["where", "remote"].map(|name| get::<String>(options, name));
    let [local, remote] = [Endpoint::parse(&local?), Endpoint::parse(&remote?)];
    let port = there(options, || DgramPort::open(&local, &remote))?;
    let watch = Watch::Dgram(port.watch());
    Ok(Opened::whole(port, watch))
}

pub(crate) fn open_stream(options: &Bound<'_, PyDict>, control: &Control) -> PyResult<Opened> {
    let at = Endpoint::parse(&get::<String>(options, "where")?);
    let client = get(options, "client")?;
    let port = there(options, || StreamPort::open(&at, client, control))?;
    let watch = Watch::Stream(port.watch());
    Ok(Opened::whole(port, watch))
}

/// An address, with VXLAN's port if it has none. `virtnet.spec` has checked it.
fn address(text: &str) -> PyResult<SocketAddr> {
    if let Ok(address) = text.parse() {
        return Ok(address);
    }
    let bare = text.trim_start_matches('[').trim_end_matches(']');
    let ip: Result<std::net::IpAddr, _> = bare.parse();
    ip.map(|ip| SocketAddr::new(ip, VXLAN_PORT))
        .map_err(|_| ConfigError::new_err(format!("{text:?} is no IP address")))
}
