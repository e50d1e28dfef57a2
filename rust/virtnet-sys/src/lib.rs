//! Linux for virtnet: eventfd, epoll, unix sockets with descriptors, tun.
