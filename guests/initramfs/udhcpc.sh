#!/bin/busybox sh
# What udhcpc calls with a lease: sets address and default route.
case "$1" in
    bound|renew)
        ip addr flush dev "$interface"
        ip addr add "$ip/$mask" dev "$interface"
        [ -n "$router" ] && ip route add default via "${router%% *}"
        [ -n "$dns" ] && echo "nameserver ${dns%% *}" > /etc/resolv.conf ;;
esac
exit 0
