#include "app/serve/http_server.h"

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace moba::app {
namespace {

/// Ten events from a thread of its own.
class Ticks : public PendingResponse {
 public:
  ~Ticks() override {
    is_abandoned_ = true;
    thread_.join();
  }
  void on_ready(std::function<void()> ready) override {
    thread_ = std::thread([this, ready = std::move(ready)] {
      for (int i = 0; i < 10 && !is_abandoned_; ++i) {
        {
          const std::lock_guard lock(mutex_);
          events_ += "data: tick\n\n";
          is_last_ = i == 9;
        }
        ready();
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
    });
  }
  Part next() override {
    const std::lock_guard lock(mutex_);
    return {.events = std::exchange(events_, {}), .is_last = is_last_};
  }

 private:
  std::atomic<bool> is_abandoned_ = false;
  std::mutex mutex_;  // of what follows
  std::string events_;
  bool is_last_ = false;
  std::thread thread_;
};

int connection_to(std::uint16_t port) {
  const int client = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(port);
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  EXPECT_EQ(connect(client, reinterpret_cast<const sockaddr*>(&address), sizeof(address)), 0);
  return client;
}

/// Sends bytes and returns what comes, until `end` or the end of the connection.
std::string exchange(int client, const std::string& request, const std::string& end) {
  EXPECT_EQ(send(client, request.data(), request.size(), MSG_NOSIGNAL), std::ssize(request));
  std::string answer;
  char buffer[4096];
  while (answer.find(end) == std::string::npos) {
    const ssize_t size = recv(client, buffer, sizeof(buffer), 0);
    if (size <= 0) break;
    answer.append(buffer, static_cast<std::size_t>(size));
  }
  return answer;
}

int ticks_in(const std::string& text) {
  int count = 0;
  for (std::size_t at = 0; (at = text.find("data: tick", at)) != std::string::npos; ++at) ++count;
  return count;
}

TEST(HttpServer, ClientsOfManyThreadsGetTheirStreams) {
  std::atomic<int> responses = 0;
  std::atomic<bool> is_stopping = false, is_aborted = false;
  HttpServer server({.port = 0}, {.check = [&](const HttpRequest& head) -> std::optional<HttpResponse> {
                                    if (head.path == "/refused")
                                      return error_response(HttpError(404, "path: expected another"));
                                    return std::nullopt;
                                  },
                                  .handle = [](const HttpRequest& request) -> HttpReply {
                                    if (request.path == "/echo") return HttpResponse{.body = request.body};
                                    if (request.path == "/wrong")
                                      throw HttpError(400, "body: expected another");
                                    return std::make_unique<Ticks>();
                                  },
                                  .count = [&](unsigned) { ++responses; },
                                  .begin_stop = [&] { is_stopping = true; },
                                  .abort = [&] { is_aborted = true; }});
  std::thread running([&] { server.run(); });

  std::vector<std::thread> clients;
  clients.reserve(4);
  for (int i = 0; i < 4; ++i) {
    clients.emplace_back([&] {
      const int client = connection_to(server.port());
      for (int repeat = 0; repeat < 5; ++repeat) {
        EXPECT_EQ(ticks_in(exchange(client, "GET /ticks HTTP/1.1\r\n\r\n", "\r\n0\r\n\r\n")), 10);
        EXPECT_NE(
            exchange(client, "POST /echo HTTP/1.1\r\nContent-Length: 4\r\n\r\nabcd", "abcd").find(" 200 "),
            std::string::npos);
        EXPECT_NE(exchange(client, "GET /wrong HTTP/1.1\r\n\r\n", "}}").find(" 400 "), std::string::npos);
        EXPECT_NE(exchange(client, "GET /refused HTTP/1.1\r\n\r\n", "}}").find(" 404 "), std::string::npos);
      }
      close(client);
      const int leaves = connection_to(server.port());
      exchange(leaves, "GET /ticks HTTP/1.1\r\n\r\n", "data: tick");
      close(leaves);
    });
  }
  for (std::thread& client : clients) client.join();
  EXPECT_GE(responses, 4 * 5 * 4);
  server.stop();
  running.join();
  EXPECT_TRUE(is_stopping && is_aborted);
}

TEST(HttpServer, LoopbackAddressesAreRecognised) {
  for (const char* host : {"127.0.0.1", "127.8.8.8", "::1", "localhost"})
    EXPECT_TRUE(is_loopback(host)) << host;
  for (const char* host : {"0.0.0.0", "::", "192.168.0.1", "example.org", ""})
    EXPECT_FALSE(is_loopback(host)) << host;
}

}  // namespace
}  // namespace moba::app
